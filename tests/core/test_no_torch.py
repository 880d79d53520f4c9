"""The planning half of the engine runs where no torch is installed."""

import subprocess
import sys


def test_core_and_fake_runner_import_neither_torch_nor_ray():
    code = (
        "import sys\n"
        "import octavo.engine.core.engine, octavo.engine.runner.fake, octavo.engine.types, octavo.engine.config\n"
        "import octavo.engine.text.stream, octavo.engine.text.byte_tokenizer\n"
        "bad = {'torch', 'ray', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imported {bad}' if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
