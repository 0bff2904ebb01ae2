"""Dockerfile and configs/cluster: files and options that they name exist; the shell part of the Slurm script runs."""

import os
import re
import subprocess
import time
from pathlib import Path

import yaml

from mindsigma.training.run_options import build_parser

ROOT = Path(__file__).parents[1]
CLUSTER = ROOT / "configs" / "cluster"


def test_options_and_files_exist():
    known = build_parser()._option_string_actions
    job = yaml.safe_load((CLUSTER / "train.yaml").read_text())
    texts = [(CLUSTER / "train.slurm").read_text(), str(job)]
    for text in texts:
        command = text[text.index("train_ascend_multi_node.sh") :].partition("\ntask=")[0]
        assert set(re.findall(r"--[a-z-]+", command)) <= set(known)
        for path in re.findall(r"(?:configs|tools)/[\w/.-]+\.(?:yaml|sh)", text):
            assert (ROOT / path).is_file(), path
    assert {"NODES", "NPUS", "NODE_RANK", "MASTER_ADDR"} <= set(re.findall(r"[A-Z_]+(?==)", str(job)))
    node = job["spec"]["tasks"][0]
    assert job["spec"]["minAvailable"] == node["replicas"] == 2


def test_dockerfile_copies_what_is_there():
    text = (ROOT / "Dockerfile").read_text()
    sources = [name for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE) for name in line.split()[:-1]]
    assert sources and all((ROOT / name).exists() for name in sources)
    assert 'pip install --no-cache-dir ".[web]"' in text and "\nweb = [" in (ROOT / "pyproject.toml").read_text()


def stand_in(folder, name, text):
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
    (folder / name).chmod(0o755)


def slurm_job(tmp_path):
    """Environment of train.slurm among stand-ins; the launcher prints what it was given."""
    work, programs = tmp_path / "work", tmp_path / "bin"
    (work / "tools" / "launch").mkdir(parents=True)
    (work / ".venv" / "bin").mkdir(parents=True)
    programs.mkdir()
    (work / ".venv" / "bin" / "activate").write_text("")
    (tmp_path / "set_env.sh").write_text("")
    stand_in(work / "tools" / "launch", "train_ascend_multi_node.sh", 'echo "$NODES $NODE_RANK $MASTER_ADDR $NPUS $*"')
    stand_in(programs, "srun", 'for i in 0 1; do SLURM_NODEID=$i "$@"; done')
    stand_in(programs, "scontrol", '[[ $1 == show ]] && printf "first\\nsecond\\n" || echo "scontrol $*"')
    return {
        "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(work), "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "x[1-2]", "SLURM_JOB_ID": "7", "CANN": str(tmp_path), "DATA": "/d", "OUTPUT": "/o",
    }  # fmt: skip


def test_slurm_script(tmp_path):
    """`srun` starts two tasks; the first host is the master; nothing is queued again."""
    environment = slurm_job(tmp_path)
    done = subprocess.run(
        ["bash", CLUSTER / "train.slurm"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    flags = "--config configs/train/1024-MS.yaml --data /d --output /o"
    assert done.stdout.splitlines() == [f"2 {rank} first 8 {flags}" for rank in (0, 1)]


def test_slurm_script_near_the_end_of_its_time(tmp_path):
    """SIGTERM is handed to the tasks by scancel, as srun would kill them; when they have ended, the job waits again."""
    environment = slurm_job(tmp_path)
    stand_in(tmp_path / "bin", "srun", f"touch {tmp_path}/began; until [[ -e {tmp_path}/told ]]; do sleep 0.05; done")
    stand_in(tmp_path / "bin", "scancel", f'echo "scancel $*"; touch {tmp_path}/told')
    job = subprocess.Popen(["bash", CLUSTER / "train.slurm"], env=environment, stdout=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not (tmp_path / "began").exists() and time.monotonic() < end:
        time.sleep(0.02)
    job.terminate()
    told, _ = job.communicate(timeout=60)
    assert (job.returncode, told.splitlines()) == (0, ["scancel --signal=TERM 7", "scontrol requeue 7"])
