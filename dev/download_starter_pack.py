"""
Fetch llm.c's starter pack from Hugging Face into data/: GPT-2's weights, its tokenizer, Tiny Shakespeare as tokens.

    python dev/download_starter_pack.py          # what training needs (499 MB)
    python dev/download_starter_pack.py --all    # also the bf16 weights, the debug state and HellaSwag (1.3 GB)

Files that are complete are skipped; an interrupted download goes on where it stopped.
"""

if __name__ == "__main__" and not __package__:  # run by its path: modules come from the project, not from this folder
    import os
    import sys
    sys.path[0] = os.path.realpath(__file__).rpartition(f"{os.sep}dev{os.sep}")[0]

from pathlib import Path

from dev.data.command_line import DATA, run, show
from dev.data.download import HF, download, remote_size
from dev.data.vocabulary import TOKENIZER_SHA256
from dev.run.arguments import Parser

URL = f"{HF}/datasets/karpathy/llmc-starter-pack/resolve/main"

# file: (folder below data/, bytes, sha256, needed for training)
FILES = {
    "gpt2_tokenizer.bin": (".", None, TOKENIZER_SHA256, True),
    "tiny_shakespeare_val.bin": (
        "tinyshakespeare", 66560, "fe99db720dc7c83e694806d4e047a952909411da1daccde4ccc2e55f40882a62", True),
    "tiny_shakespeare_train.bin": (
        "tinyshakespeare", 611544, "8a70606be574040c26d225694f5f9759973b419852d22f7fe5c118e1b359dcc8", True),
    "gpt2_124M.bin": (".", 497904640, None, True),
    "gpt2_124M_bf16.bin": (".", 248952832, None, False),
    "gpt2_124M_debug_state.bin": (".", 549369860, None, False),
    "hellaswag_val.bin": ("hellaswag", None, None, False),
}


def main():
    parser = Parser(description="Fetch llm.c's starter pack")
    parser.add_argument("--all", action="store_true", help="also what only tests and evaluations need")
    parser.add_argument("--data_dir", type=Path, default=DATA, help="where the files go (default: data/)")
    parser.add_argument("--base_url", default=URL, help="where the files come from")
    args = parser.parse_args()

    for name, (folder, size, sha256, needed) in FILES.items():
        if not (needed or args.all):
            continue
        url, path = f"{args.base_url}/{name}", args.data_dir / folder / name
        if size is None and sha256 is None and path.exists():
            size = remote_size(url)
        download(url, path, size, sha256)
        print(f"complete: {show(path)} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    run(main)
