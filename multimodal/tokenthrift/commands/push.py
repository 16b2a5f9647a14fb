"""`tokenthrift push`: uploads a model's folder, after loading it in full, so that nothing broken is ever uploaded."""

from __future__ import annotations

from collections.abc import Sequence

from tokenthrift.commands.arguments import DONE, fail, make_parser

__all__ = ["main"]


def main(argv: Sequence[str]) -> int:
    """Runs the command."""
    parser = make_parser(
        "push",
        "Upload a model's folder, card (README.md) included, after checking that it loads.\n"
        "Log in once with `hf auth login`, or set HF_TOKEN.",
    )
    parser.add_argument("model", metavar="MODEL", help="the folder with config.json and model.safetensors")
    parser.add_argument("repository", metavar="REPOSITORY", help="owner/name on the Hub; created if needed")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    parser.add_argument("--revision", metavar="NAME", help="branch to upload to, created if needed (default: main)")
    parser.add_argument(
        "--message", metavar="TEXT", default="Upload model", help="what the commit says (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        from tokenthrift.hub import push_folder
        from tokenthrift.models import load
        from tokenthrift.sources import SourceError, is_folder

        if not is_folder(arguments.model):
            raise SourceError(f"there is no folder {arguments.model!r} to upload")
        load(arguments.model)
        address = push_folder(
            arguments.model,
            arguments.repository,
            private=arguments.private,
            revision=arguments.revision,
            commit_message=arguments.message,
        )
    except (ImportError, OSError, ValueError) as error:
        return fail("push", error)
    print(address)
    return DONE
