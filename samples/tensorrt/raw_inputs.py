"""Writes the inputs that polygraphy saved as raw files for `trtexec --loadInputs`, and prints the two arguments.

trtexec fills inputs that it is not given with random numbers, on which a sparse engine's speed means nothing.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", type=Path, help="inputs.json of `sa-export check`")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the raw files")
    args = parser.parse_args()

    from polygraphy.json import load_json

    args.output.mkdir(parents=True, exist_ok=True)
    feed = load_json(str(args.inputs))[0]
    files = {}
    for name, value in feed.items():
        if value.size:  # an empty cache has nothing to load
            files[name] = args.output / f"{name}.bin"
            value.tofile(files[name])
    print("--loadInputs=" + ",".join(f"{name}:{path}" for name, path in files.items()))
    print("--shapes=" + ",".join(f"{name}:{'x'.join(map(str, value.shape))}" for name, value in feed.items()))


if __name__ == "__main__":
    main()
