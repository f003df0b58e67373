"""How to repeat a run: with the versions that trained."""

from harness.records import store
from harness.report.again import how_to_repeat


def test_versions_are_those_that_scripts_tell(write_run):
    """Of what their processes had in one version; where they had several no line could bring them all."""

    def tell(record):
        return record.replaced(software={"python": "3.12.1", "torch": "3.0", "peft": f"1.{record.replicate}"})

    path = write_run("one", {"plain": [1.0, 1.1]}, change=tell, facts={"libraries": {"torch": "1.0", "peft": "0.1"}})
    python, install, *_ = how_to_repeat(store.read_run("one", path.parent)).splitlines()
    assert python.startswith("# Python 3.12.1;")
    assert install == "pip install torch==3.0"
