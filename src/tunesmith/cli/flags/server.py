"""The flags of `serve`, `demo` and `keys`."""

from __future__ import annotations

from tunesmith.cli.flags.common import EVERYWHERE, LISTING, Commands, add_group


def add_serve(commands: Commands) -> None:
    """`serve`."""
    serve = commands.add_parser(
        "serve",
        parents=[EVERYWHERE],
        help="Start the server: API, training and generation.",
        description="Start the server. Every flag may also be given as TUNESMITH_<FLAG>, for example TUNESMITH_HOME. "
        "The first start makes an owner key, shows it once and keeps it in <home>/owner.key.",
    )
    serve.add_argument("--home", help="Folder for everything that is kept (default: ~/.tunesmith).")
    serve.add_argument(
        "--host", help="Address to listen on (default: 127.0.0.1). Any other than loopback needs TUNESMITH_OWNER_KEY."
    )
    serve.add_argument("--port", help="Port to listen on; 0 takes a free one (default: 8000).")
    serve.add_argument(
        "--organization",
        dest="organization_title",
        help="Title of the organisation that the first start creates; it stands in model names (default: personal).",
    )
    serve.add_argument(
        "--max-concurrent-runs",
        help="How many trainers work at once, each on one job or several small ones (default: 1).",
    )
    serve.set_defaults(run="tunesmith.cli.serve:serve")


def add_demo(commands: Commands) -> None:
    """`demo`."""
    demo = commands.add_parser(
        "demo",
        parents=[EVERYWHERE],
        help="Fine-tune a small model on real tweets, end to end, in a few minutes.",
        description="Starts a server of its own on a free port, fine-tunes ada to tell positive from negative tweets, "
        "and compares it with the base model on tweets it has not seen. Nothing is left running.",
    )
    demo.add_argument(
        "--home", default=".demo", help="Folder the demo works in (default: ./.demo); it stays afterwards."
    )
    demo.add_argument(
        "--keep", action="store_true", help="Go on in the home of an earlier demo instead of starting it afresh."
    )
    demo.set_defaults(run="tunesmith.cli.demo:demo")


def add_keys(commands: Commands) -> None:
    """`keys` and its verbs."""
    verbs = add_group(commands, "keys", "API keys of the organisation.")
    listing = verbs.add_parser("list", parents=[LISTING], help="List the keys; secrets are never shown again.")
    listing.set_defaults(run="tunesmith.cli.keys:list_keys")
    create = verbs.add_parser("create", parents=[EVERYWHERE], help="Make a key and show its secret, once.")
    create.add_argument(
        "--role",
        choices=["owner", "member"],
        default="member",
        help="Owners may delete models and manage keys (default: member).",
    )
    create.add_argument("--name", required=True, help="What the key is for, for people.")
    create.set_defaults(run="tunesmith.cli.keys:create_key")
    revoke = verbs.add_parser("revoke", parents=[EVERYWHERE], help="End a key at once.")
    revoke.add_argument("-i", "--id", required=True, help="Id of the key, from `tunesmith keys list`.")
    revoke.set_defaults(run="tunesmith.cli.keys:revoke_key")
