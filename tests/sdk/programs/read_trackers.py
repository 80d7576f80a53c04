"""What is in a local store of Trackio or MLflow, as JSON: config, {metric: {step: value}}, files."""

import json
import os
import sys

kind, folder, project = sys.argv[1:]
found = {}
if kind == "trackio":
    os.environ["TRACKIO_DIR"] = folder
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    for run in trackio.Api().runs(project):
        metrics = {}
        for point in SQLiteStorage.get_logs(project, run.name):
            for name in point.keys() - {"step", "timestamp"}:
                metrics.setdefault(name, {})[point["step"]] = point[name]
        found[run.name] = {"config": run.config, "metrics": metrics}
    found["kinds"] = [artifact["type"] for artifact in SQLiteStorage.list_artifacts(project)]
else:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [one for one in client.search_experiments() if one.name == project]
    for run in client.search_runs([experiment.experiment_id]):
        histories = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
        files = [
            file.path
            for folder in client.list_artifacts(run.info.run_id)
            for file in client.list_artifacts(run.info.run_id, folder.path)
        ]
        found[run.info.run_name] = {
            "config": run.data.params,
            "tags": {name: value for name, value in run.data.tags.items() if not name.startswith("mlflow.")},
            "status": run.info.status,
            "metrics": {name: {one.step: one.value for one in history} for name, history in histories.items()},
            "files": sorted(files),
        }
        found["kinds"] = [name.partition("/")[0] for name in files]
print(json.dumps(found))
