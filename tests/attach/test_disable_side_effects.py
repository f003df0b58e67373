"""Tests that a measured script does not report, save or publish."""

import importlib.util
import sys

import pytest
from huggingface_hub import hf_api

from lorameter.attach import disable_side_effects


def test_a_trainer_saves_reports_and_pushes_nothing(tmp_path):
    """A Trainer saves, reports and pushes nothing whatever its arguments are; its other arguments are unchanged."""
    from transformers import TrainingArguments, training_args

    complete = TrainingArguments.__post_init__
    try:
        disable_side_effects.disable_trainer_side_effects(training_args)
        made = TrainingArguments(
            output_dir=str(tmp_path), save_strategy="steps", save_steps=5, push_to_hub=True, report_to=["wandb"],
            use_cpu=True, learning_rate=0.5, eval_strategy="no", load_best_model_at_end=True,
        )  # fmt: skip
    finally:
        TrainingArguments.__post_init__ = complete
    assert (made.save_strategy.value, made.push_to_hub, made.report_to) == ("no", False, [])
    assert (made.learning_rate, made.load_best_model_at_end) == (0.5, False)


READING = """
    auth bucket dataset download fetch file get hf inspect is kernel list model paper parse read repo resolve revision
    search snapshot space sync url verify wait whoami
""".split()
"""First words of client methods that only read; `run_as_future` only calls another method in a thread."""


@pytest.fixture
def hub(monkeypatch):
    """A second copy of the real client's module, since blocked writes cannot be enabled again."""
    spec = importlib.util.spec_from_file_location("huggingface_hub.closed_here", hf_api.__file__)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_every_writing_method_of_the_hub_client_is_refused(hub):
    """Each client method either reads, according to its first word, or refuses; so does the module function of the same
    name."""
    names = {name for name, one in vars(hub.HfApi).items() if callable(one) and not name.startswith("_")}
    functions = {name for name in names if hasattr(hub, name)}
    disable_side_effects.block_hub_writes(hub)
    closed = set()
    for name in names - {"run_as_future"}:
        if name.partition("_")[0] not in READING:
            calls = [getattr(hub.HfApi(), name), *([getattr(hub, name)] if name in functions else [])]
            for call in calls:
                with pytest.raises(RuntimeError, match="publishes nothing"):
                    call("me/model", repo_type="model")
            closed.add(name)
    wanted = """
        create_repo create_commit create_branch create_tag upload_file upload_folder delete_repo delete_file
        delete_files delete_folder move_repo update_repo_settings super_squash_history preupload_lfs_files
    """
    assert set(wanted.split()) <= closed & functions
