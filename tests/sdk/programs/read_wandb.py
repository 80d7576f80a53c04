"""What is in the file of an offline run of W&B, as JSON: config, history, summary, artifacts, exit code.

The file is a log in LevelDB's format (records in blocks of 32 KiB, whole or in parts) behind a header of 7 bytes; each
record is a protobuf message of W&B's own.
"""

import json
import struct
import sys
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER, FILE_HEADER = 32_768, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(content):
    at, parts = FILE_HEADER, b""
    while at < len(content):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", content, at)
        part = content[at + HEADER : at + HEADER + length]
        at += HEADER + length
        parts = part if kind in (FULL, FIRST) else parts + part
        if kind in (FULL, LAST):
            yield Record.FromString(parts)


def key(item):
    return item.key or ".".join(item.nested_key)


found = {"history": [], "summary": {}, "config": {}, "artifacts": [], "run": None, "exit_code": None}
for record in records(Path(sys.argv[1]).read_bytes()):
    match record.WhichOneof("record_type"):
        case "run":
            found["run"] = {name: getattr(record.run, name) for name in ("run_id", "project", "entity", "display_name")}
            found["run"]["tags"] = list(record.run.tags)
            found["config"] |= {key(item): json.loads(item.value_json) for item in record.run.config.update}
        case "config":
            found["config"] |= {key(item): json.loads(item.value_json) for item in record.config.update}
        case "history":
            found["history"].append({key(item): json.loads(item.value_json) for item in record.history.item})
        case "summary":
            found["summary"] |= {key(item): json.loads(item.value_json) for item in record.summary.update}
        case "artifact":
            files = [entry.path for entry in record.artifact.manifest.contents]
            aliases = list(record.artifact.aliases)
            artifact = {"name": record.artifact.name, "type": record.artifact.type, "aliases": aliases, "files": files}
            found["artifacts"].append(artifact)
        case "use_artifact":
            found["artifacts"].append({"name": record.use_artifact.name, "type": record.use_artifact.type})
        case "exit":
            found["exit_code"] = record.exit.exit_code
print(json.dumps(found))
