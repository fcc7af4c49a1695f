"""scripts/examples: what Slurm and Kubernetes would start, started here."""
import os
import re
import subprocess
import sys

import pytest

from copydet.descriptors import Descriptors
from helpers import ROOT, data_folder

EXAMPLES = ROOT / "scripts" / "examples"
# Slurm's commands, of a cluster that is this machine: jobs run when they are submitted, a node is a process
SLURM = {"sbatch": r'''
for word; do
    case $word in
        --nodes=*) export SLURM_NNODES=${word#*=} SLURM_JOB_NODELIST=cluster;;
        --array=0-*) last=${word#--array=0-};;
        --wrap=*) command=${word#*=};;
    esac
done
echo "$*" >> "$SUBMITTED"
for i in $(seq 0 "${last:-0}"); do
    if [ -n "${last:-}" ]; then export SLURM_ARRAY_TASK_ID=$i; fi
    bash -c "$command" >&2
done
echo 7''', "scontrol": 'echo localhost', "srun": r'''
for _ in $(seq "$SLURM_NNODES"); do "$@" & nodes="${nodes:-} $!"; done
for node in $nodes; do wait "$node"; done'''}


def test_slurm_trains_on_two_machines_extracts_in_shards_and_merges(tmp_path):
    data, commands = data_folder(tmp_path / "data", 4, 6, 16), tmp_path / "bin"
    commands.mkdir()
    for name, text in SLURM.items():
        (commands / name).write_text(f"#!/usr/bin/env bash\nset -eu\n{text}\n")
        (commands / name).chmod(0o755)
    (data / "public_ground_truth.csv").write_text("query_id,reference_id\nQ00000,R000001\n" + "".join(
        f"Q{i:05d},\n" for i in range(1, 4)))
    flags = ("-a test_efficientnet --no-pretrained --input-size 32 --batch-size 4 --memory-size 24 --epochs 1 --device "
             "cpu -j 0 --seed 3")
    env = {"PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "LOGS": tmp_path / "logs", "OMP_NUM_THREADS": 1,
           "SUBMITTED": tmp_path / "submitted", "PYTHON": sys.executable, "EXP": tmp_path / "run", "FLAGS": flags,
           "NODES": 2, "PROCESSES": 1, "SHARDS": 2, "TARGETS": "qr", "IMAGES": data / "training_images", "DATA": data,
           "PORT": 20000 + os.getpid() % 20000}
    done = subprocess.run(["bash", EXAMPLES / "slurm.sh"], capture_output=True, text=True, timeout=900,
                          env=os.environ | {name: str(value) for name, value in env.items()})
    assert not done.returncode, done.stderr
    assert "2 processes on cpu" in done.stderr and '"average_precision"' in done.stderr
    with Descriptors(tmp_path / "run" / "extract" / "fb-isc-submission.h5") as merged:
        assert (len(merged["query"]), len(merged["reference"])) == (4, 6)
    submitted = (tmp_path / "submitted").read_text().splitlines()
    assert ["afterok:7" in line for line in submitted] == [False, True, True]


def test_kubernetes_starts_the_same():
    yaml = pytest.importorskip("yaml")
    parts = {part["metadata"]["name"] + "/" + part["kind"]: part for part in yaml.safe_load_all(
        (EXAMPLES / "kubernetes.yaml").read_text())}
    settings, service = parts["copydet/ConfigMap"]["data"], parts["copydet/Service"]
    for step, count in (("train", "NODES"), ("extract", "SHARDS"), ("merge", None)):
        job = parts[f"copydet-{step}/Job"]["spec"]
        container, = job["template"]["spec"]["containers"]
        assert container["command"] == ["bash", "scripts/examples/node.sh", step]
        if count:
            assert job["completions"] == job["parallelism"] == int(settings[count])
            assert job["completionMode"] == "Indexed"
    train = parts["copydet-train/Job"]["spec"]["template"]["spec"]
    assert train["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == int(settings["PROCESSES"])
    assert settings["HEAD"] == f"copydet-train-0.{train['subdomain']}"
    assert train["subdomain"] == service["metadata"]["name"]
    known = set(re.findall(r"\$\{(\w+)[:}]", (EXAMPLES / "node.sh").read_text()))
    assert settings.keys() <= known and "JOB_COMPLETION_INDEX" in known
