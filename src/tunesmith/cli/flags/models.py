"""The flags of `models`."""

from __future__ import annotations

from tunesmith.cli.flags.common import EVERYWHERE, LISTING, Commands, add_name


def add_models(commands: Commands) -> None:
    """`models` and its verbs."""
    models = commands.add_parser(
        "models",
        parents=[LISTING],
        help="Models: list them, export and import weights, pull, check and quantize base models.",
        description="Without a command: the same as list.",
    )
    models.set_defaults(run="tunesmith.cli.models:list_models")
    verbs = models.add_subparsers(title="commands", metavar="COMMAND")
    listing = verbs.add_parser(
        "list",
        parents=[LISTING],
        help="List the models that can be called and tuned, and what stands behind each.",
    )
    listing.set_defaults(run="tunesmith.cli.models:list_models")

    export = verbs.add_parser(
        "export",
        parents=[EVERYWHERE],
        help="Write the weights of a model: adapter or checkpoint as a zip, or a GGUF file for llama.cpp.",
        description="By default what was trained: an adapter in PEFT's format, or a whole checkpoint where all weights "
        "were. Both are safetensors that other engines load. GGUF is for llama.cpp and what is built on it, such as "
        "Ollama; the file's log-probabilities are held against the model's before you get it.",
    )
    add_name(export, "model", of="model", metavar="MODEL", help="Name of the model.")
    export.add_argument(
        "--format",
        choices=["adapter", "merged", "gguf"],
        help="The adapter alone, a checkpoint with the adapter in it, or that as GGUF.",
    )
    export.add_argument(
        "--precision",
        choices=["f32", "bf16", "q8_0"],
        help="Of the matrices in a GGUF file; smaller ones lose some digits (default: f32).",
    )
    export.add_argument(
        "-o", "--output", metavar="FILE", help="File to write (default: the model's name, with .zip or .gguf)."
    )
    export.set_defaults(run="tunesmith.cli.models:export_model")

    importing = verbs.add_parser(
        "import",
        parents=[EVERYWHERE],
        help="Make a model of weights from elsewhere: a LoRA adapter of PEFT, or a checkpoint.",
        description="Safetensors only. The engine loads the model before it is taken: one that does not fit its base "
        "is refused with the reason.",
    )
    importing.add_argument("path", metavar="PATH", help="Folder or zip of the adapter or the checkpoint.")
    importing.add_argument("--base", required=True, help="The base that the weights are for.")
    importing.add_argument("--suffix", help="Up to 40 characters that go into the name of the model.")
    importing.set_defaults(run="tunesmith.cli.models:import_model")

    pull = verbs.add_parser(
        "pull",
        parents=[EVERYWHERE],
        help="Make a model of the model hub a base: download, verify and pin it.",
        description="Downloads safetensors, config and tokenizer, verifies every digest, and writes the base to "
        "<home>/bases.toml with its commit pinned. Broken off, the same command goes on where it was. HF_TOKEN opens "
        "gated and private models, HF_ENDPOINT names another hub. No other command downloads anything.",
    )
    pull.add_argument(
        "repository",
        nargs="?",
        metavar="ORG/NAME",
        help="The model on the hub; without it, every hub model of bases.toml that is not here yet.",
    )
    pull.add_argument("--revision", help="Commit, branch or tag (default: main); the commit it means now is pinned.")
    pull.add_argument(
        "--as",
        dest="alias",
        metavar="NAME",
        help="What the base is called; ada, babbage, curie or davinci put it in place of the one in the box "
        "(default: after the repository).",
    )
    pull.add_argument("--home", help="Folder for everything that is kept (default: TUNESMITH_HOME or ~/.tunesmith).")
    pull.set_defaults(run="tunesmith.cli.pull:pull_models")

    quantize = verbs.add_parser(
        "quantize",
        parents=[EVERYWHERE],
        help="Make a base in 4 bits a weight of one that is here (QLoRA's NF4).",
        description="Packs the matrices of a base of the Llama family as bitsandbytes does for QLoRA (NF4), and adds "
        "the result to <home>/bases.toml as a base of its own. What the 4 bits stand for is the new base, wherever it "
        "is computed; adapters of the old one are not for it. Needs: pip install 'tunesmith[bitsandbytes]'",
    )
    quantize.add_argument("base", metavar="BASE", help="Name of the base.")
    quantize.add_argument("--as", dest="alias", metavar="NAME", help="What the new one is called (default: BASE-4bit).")
    quantize.add_argument(
        "--home", help="Folder for everything that is kept (default: TUNESMITH_HOME or ~/.tunesmith)."
    )
    quantize.set_defaults(run="tunesmith.cli.quantize:quantize_model")

    check = verbs.add_parser(
        "check",
        parents=[EVERYWHERE],
        help="Check base models: files, digests, tokenizer, forward pass, memory.",
        description="Looks at the base models of a home folder without a server and without loading weights. Exit code "
        "1 if anything is wrong with one of them.",
    )
    check.add_argument("names", nargs="*", metavar="NAME", help="Bases to check (default: all).")
    check.add_argument("--home", help="Folder for everything that is kept (default: TUNESMITH_HOME or ~/.tunesmith).")
    check.set_defaults(run="tunesmith.cli.check:check")
