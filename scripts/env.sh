# Sourced by test.sh and quickstart.sh: prepare_env makes or reuses .venv in the project's root and sets `python`.

die() {
    echo "$1" >&2
    exit "${2:-2}"
}

prepare_env() {
    local version=${PYTHON:-python3} stamp=.venv/requirements.stamp wanted
    python=.venv/bin/python
    if ! "$python" -m pip --version >/dev/null 2>&1; then
        "$version" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
            die "$version: Python 3.10 or newer is needed; name one with PYTHON=/path/to/python3"
        echo "making the environment .venv with $("$version" --version)"
        "$version" -m venv --clear .venv ||
            die "$version -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" 1
    fi
    wanted=$(cat requirements.txt requirements-dev.txt | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "installing requirements-dev.txt into .venv (some minutes, the first time)"
        "$python" -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt ||
            die "pip install failed" 1
        echo "$wanted" > "$stamp"
    fi
    need_libmagic
}

need_libmagic() {  # a system library that augly loads through python-magic
    "$python" -c 'import magic' 2>/dev/null && return
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        { apt-get update && apt-get install -y libmagic1; } >/dev/null 2>&1 || true
    fi
    "$python" -c 'import magic' 2>/dev/null ||
        die "the system library libmagic is missing: apt-get install libmagic1 (macOS: brew install libmagic)" 1
}
