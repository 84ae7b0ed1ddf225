"""What the plain install brings is enough for all that the README promises of it: no extra is imported on the way."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXTRAS = ("bitsandbytes", "deepspeed", "vllm", "math_verify", "tensorboard", "mlflow")


def rlhf(*words: str) -> str:
    """The command in a process that has none of them; what it printed, on stderr too."""
    code = (
        "import sys\n"
        f"for name in {EXTRAS!r}: sys.modules[name] = None\n"
        "from rlhf.cli import main\n"
        "main(sys.argv[1:])"
    )  # fmt: skip
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"{words}: {ended.stderr[-2000:]}"
    return ended.stdout + ended.stderr


@pytest.mark.matrix
def test_every_stage_with_adapters(tmp_path: Path) -> None:
    few = ("--max-steps", "2", "--batch-size", "8", "--eval-rows", "8", "--mem", "lora")
    sft, judge, dpo, ppo = (str(tmp_path / name) for name in ("sft", "reward", "dpo", "ppo"))
    rlhf("run", "--algo", "sft", *few, "--output", sft)
    rlhf("run", "--algo", "reward", "--model", sft, *few, "--output", judge)
    rlhf("run", "--algo", "dpo", "--model", sft, *few, "--output", dpo)
    words = ("--reward", "model", "--model", f"reward={judge}", "--engine.max-new-tokens", "8")
    rlhf("run", "--algo", "ppo", "--model", sft, *few, *words, "--output", ppo)
    for run, role in ((sft, "policy"), (judge, "reward"), (dpo, "policy"), (ppo, "policy"), (ppo, "value")):
        plain = tmp_path / "plain" / role / Path(run).name
        plain.parent.mkdir(parents=True, exist_ok=True)
        said = rlhf("export", run, "--role", role, "--output", str(plain))
        assert "adapters merged" in said or run != sft  # what began with adapters was saved whole
        assert (plain / "config.json").is_file() and not (plain / "adapter_config.json").exists()
    rlhf("eval", ppo)
    rlhf("report", ppo)
    assert json.loads((Path(ppo) / "summary.json").read_text())["status"] == "done"
