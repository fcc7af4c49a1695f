#!/usr/bin/env bash
# Make or reuse the environment .venv and run the tests; arguments go to pytest: bash scripts/test.sh -k benchmark
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/env.sh
prepare_env
exec "$python" -m pytest "$@"
