"""The stages of an experiment, what says that one is finished, and all of them in a row.

synthesize -> pack -> train -> embed -> classify -> evaluate
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.load import load
from configs.schema import Experiment
from launch.job import Job


@dataclass(frozen=True)
class Call:
    """An experiment as the user named it; a stage under torchrun is given the same words."""

    config: Path
    overrides: Sequence[str]
    experiment: Experiment

    @classmethod
    def of(cls, config: Path, overrides: Sequence[str]) -> "Call":
        """Load the experiment; raises UserError."""
        return cls(config, overrides, load(config, overrides))

    def job(self, stage: str) -> Job:
        """One stage of it, on processes of its own."""
        return Job(stage, self.config, self.overrides, self.experiment)


@dataclass(frozen=True)
class Stage:
    """One step from the table to the report."""

    name: str
    run: Callable[[Call], None]
    finished: Callable[[Call], bool]


def run_all(call: Call) -> None:
    """Every stage that is not finished."""
    from train.runfolder import whole_run

    with whole_run(call.experiment.run.folder):
        for stage in STAGES:
            if stage.finished(call):
                print(f"── {stage.name}: finished before", flush=True)
            else:
                print(f"── {stage.name}", flush=True)
                stage.run(call)


def synthesize(call: Call) -> None:
    """Draw the synthetic data set."""
    from launch.synthetic import NOTICE
    from launch.synthetic import synthesize as draw

    if call.experiment.synthetic is None:
        raise UserError(f"{call.config}: has no `synthetic` section, so there is nothing to draw")
    table = draw(call.experiment.synthetic, call.experiment.pack)
    print(f"{table.parent}\n{NOTICE}")


def _synthesized(call: Call) -> bool:
    from launch.synthetic import check_made_by
    from shards.output import Output

    settings = call.experiment.synthetic
    if settings is None:
        return True
    if not (settings.output / "metadata.csv").exists():  # once packed, the pictures may be gone
        return Output.of(call.experiment.pack).packed()
    check_made_by(settings)
    return True


def pack(call: Call) -> None:
    """Pack tables and images into shards, alone or as one of several processes."""
    from launch import cluster
    from shards.describe import said
    from shards.pack import pack as make

    part, settings = cluster.part(), call.experiment.pack
    settings = settings.model_copy(update={"workers": settings.workers or cluster.cores()})
    made = make(settings, part=part)
    if not part.rank:
        print("\n".join(said(made, settings.output)))


def _packed(call: Call) -> bool:
    from shards.describe import check_made_by
    from shards.output import Output

    settings = call.experiment.pack
    output = Output.of(settings)
    if not output.packed():
        return False
    check_made_by(output.manifest(), settings, settings.output)
    return True


def train(call: Call) -> None:
    """Train the encoder; goes on from the newest checkpoint."""
    call.job("train").run()
    print(f"encoder: {call.experiment.run.folder / 'encoder.safetensors'}")


def _trained(call: Call) -> bool:
    from train.result import finished

    return finished(call.experiment)


def embed(call: Call) -> None:
    """Every sample's embedding."""
    call.job("embed").run()
    print(f"embeddings: {call.experiment.run.folder / 'embeddings'}")


def _embedded(call: Call) -> bool:
    from shards.shardset import ShardSet
    from train.embed import finished

    return finished(call.experiment, ShardSet.of(call.experiment))


def classify(call: Call) -> None:
    """Train the classifier on frozen embeddings."""
    from train import runfolder
    from train.classify import fit, summary
    from train.embeddings import read_meta
    from train.result import check_settings
    from train.tracking import Tracker

    meta = read_meta(call.experiment.run.folder, "train")  # no run folder is made for a run that is not there
    check_settings(call.experiment, {"embed": meta.get("embed") or {}})
    with runfolder.locked(call.experiment.run.folder), Tracker(call.experiment, "classifier") as tracker:
        runfolder.describe(call.experiment)
        record = fit(call.experiment, tracker=tracker)
    print("\n".join(summary(record)))
    print(f"classifier: {call.experiment.run.folder / 'classifier.safetensors'}")


def _classified(call: Call) -> bool:
    from train.classifier import finished

    return finished(call.experiment)


def evaluate(call: Call) -> None:
    """Figures with intervals, and the report."""
    from eval.evaluate import check_settings, headline
    from eval.evaluate import evaluate as report
    from shards.files import read_json
    from train import runfolder
    from train.classifier import load as load_classifier
    from train.tracking import Tracker

    run = call.experiment.run.folder
    check_settings(call.experiment, load_classifier(run))  # before the folder says otherwise
    notice = read_json(run / "encoder.json", "moleprint train CONFIG").get("notice", "")
    with runfolder.locked(run), Tracker(call.experiment, "evaluate") as tracker:
        runfolder.describe(call.experiment)
        figures = report(call.experiment, tracker=tracker, notice=notice)
    print(f"\n{headline(figures)}\n")
    print(f"report: {run / 'report' / 'index.html'}")
    if notice:
        print(notice)


STAGES = (
    Stage("synthesize", synthesize, _synthesized),
    Stage("pack", pack, _packed),
    Stage("train", train, _trained),
    Stage("embed", embed, _embedded),
    Stage("classify", classify, _classified),
    Stage("evaluate", evaluate, lambda call: False),  # seconds; always shown
)
