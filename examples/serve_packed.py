"""Serve a packed file over HTTP: python examples/serve_packed.py pack FILE, then python examples/serve_packed.py serve FILE.

The server never holds a float weight: the model is made on the meta device, and its parameters come from the file, memory-mapped.

    curl -d '[[0, 0, 5, 13, 9, 1, 0, 0, ...]]' http://127.0.0.1:8000/    # images of 64 pixels, 0 to 16; gives the digits
"""

import argparse
import http.server
import json
import pathlib

import torch
from torch import nn

import teint8


def make() -> nn.Module:
    """The architecture."""
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def pack(file: pathlib.Path) -> None:
    """Train on scikit-learn's digits, with the forward in INT8, and save the packed parameters."""
    from sklearn.datasets import load_digits

    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.data, dtype=torch.float32), torch.tensor(digits.target)
    model = make()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(8):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            with teint8.te_int8_autocast(training=True):
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
    packed = teint8.pack(teint8.quantize(model), dict(model.named_parameters()))
    teint8.save_packed(file, packed, policy=teint8.Policy.qat())
    print(f"{file}: {file.stat().st_size} bytes")


def server(file: pathlib.Path, port: int) -> http.server.ThreadingHTTPServer:
    """A server of what the file holds; port 0 takes a free one."""
    params, policy = teint8.load_packed(file)
    with torch.device("meta"):
        qfn = teint8.quantize(make(), policy)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                images = torch.tensor(json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0)))), dtype=torch.float32)
                with torch.no_grad():
                    answer, status = {"digits": qfn(params, images).argmax(-1).tolist()}, 200
            except (ValueError, TypeError, RuntimeError) as error:
                answer, status = {"error": str(error)}, 400
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

    return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("pack", "serve"))
    parser.add_argument("file", type=pathlib.Path)
    parser.add_argument("--port", type=int, default=8000)
    chosen = parser.parse_args()
    if chosen.command == "pack":
        pack(chosen.file)
        return
    with server(chosen.file, chosen.port) as running:
        print(f"http://127.0.0.1:{running.server_port}/")
        running.serve_forever()


if __name__ == "__main__":
    main()
