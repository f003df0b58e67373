"""What a measured script does not do: report, save, publish."""

import pytest

from harness.attach import apart


def test_a_trainer_is_asked_to_save_report_and_push_nothing(tmp_path):
    """Whatever its script says; all else of its arguments stays."""
    from transformers import TrainingArguments, training_args

    complete = TrainingArguments.__post_init__
    try:
        apart.quiet_arguments(training_args)
        made = TrainingArguments(
            output_dir=str(tmp_path), save_strategy="steps", save_steps=5, push_to_hub=True, report_to=["wandb"],
            use_cpu=True, learning_rate=0.5, eval_strategy="no", load_best_model_at_end=True,
        )  # fmt: skip
    finally:
        TrainingArguments.__post_init__ = complete
    assert (made.save_strategy.value, made.push_to_hub, made.report_to) == ("no", False, [])
    assert (made.learning_rate, made.load_best_model_at_end) == (0.5, False)


def test_the_hub_is_closed():
    """Every method that changes something there, and the functions that are made of them, say why."""
    import types

    class Api:
        def create_repo(self):
            return "made"

        def model_info(self):
            return "read"

    module = types.ModuleType("hub")
    module.HfApi, module.create_repo = Api, Api().create_repo
    apart.close_hub(module)
    for publish in (Api().create_repo, module.create_repo):
        with pytest.raises(RuntimeError, match="publishes nothing"):
            publish("name")
    assert Api().model_info() == "read"


def test_the_hook_is_told_of_all_of_them():
    """By the import that each follows."""
    assert apart.after_import().count("=harness.attach.apart:") == len(apart.CALLS)
