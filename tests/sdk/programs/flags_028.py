"""Run by openai==0.28.1's interpreter: prints {verb: [flags]} of its `openai api`, as JSON."""

import argparse
import json

from openai.cli import api_register

parser = argparse.ArgumentParser()
api_register(parser)
(verbs,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
flags = {
    verb: [flag for action in child._actions for flag in action.option_strings] for verb, child in verbs.choices.items()
}
print(json.dumps(flags))
