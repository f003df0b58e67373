"""A fixture for tests of reading and converting models: the small llama.cpp model, converted."""

import pytest


@pytest.fixture(scope="session")
def converted(gguf_file, tmp_path_factory):
    """The converted model as a directory."""
    from lorameter.trial.building import base_model as models

    out = tmp_path_factory.mktemp("converted")
    models.convert_gguf(gguf_file, out)
    return out
