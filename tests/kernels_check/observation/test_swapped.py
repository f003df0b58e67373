"""What of a library is bound in a model, told by the functions that are really called."""

from types import MethodType

import pytest
import torch

from kernels_check.observation.calls import Calls, ModuleCall
from kernels_check.observation.inputs import ModelCall
from kernels_check.observation.module_tree import ModelTree
from kernels_check.observation.swapped import swapped_places


def _from(home):
    """A function of some module, which is called nowhere here."""

    def function(*args):
        return args

    function.__module__ = home
    return function


def rotary_of_ours(*args):
    """Stands for the model's own."""
    return args


class Attention(torch.nn.Module):
    """Asks for its projections, and calls the rotary embeddings that its module names."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def forward(self, hidden):
        """Never called."""
        return self.apply_o(self, rotary_of_ours(self.apply_qkv(self, hidden)))


class Plain(Attention):
    """Calls neither."""

    def forward(self, hidden):
        """Never called."""
        return self.k_proj(self.q_proj(hidden))


def _asking(self, hidden):
    return getattr(self, "apply_o", None)(getattr(self, "apply_qkv", None)(hidden))


class Head(torch.nn.Module):
    """A model with a head, whose loss a library fuses."""

    config = loss_function = None

    def __init__(self):
        super().__init__()
        self.lm_head = torch.nn.Linear(2, 2)
        self.forward = _from("liger_kernel.transformers.model.llama")


def _libraries(module, calls=(), inputs=(), **bound):
    for name, value in bound.items():
        setattr(module, name, value)
    model = torch.nn.Sequential(module)
    found = swapped_places(ModelTree.of(model), Calls(all=tuple(calls), thread=0), inputs)
    return {place.kind: place for place in found}


LIBRARIES = [
    ("liger_kernel.transformers.rms_norm", "liger_kernel"),
    ("unsloth.kernels.rms_layernorm", "unsloth"),
    ("unsloth_zoo.temporary_patches.common", "unsloth_zoo"),
    ("axolotl.kernels.rms_norm", "axolotl"),
    ("apex.normalization.fused_layer_norm", "apex"),
    ("flash_attn.ops.rms_norm", "flash_attn"),
    ("torch.nn.modules.normalization", None),
    ("apexes.normalization", None),
]


class OwnRMSNorm(torch.nn.RMSNorm):
    """A model's own norm."""


@pytest.mark.parametrize(("home", "library"), LIBRARIES)
def test_each_library_is_told_by_the_forward_that_it_has_bound(home, library):
    """To a norm that is the model's own by its class."""
    assert _libraries(OwnRMSNorm(2))["rms_norm"].library is None
    assert _libraries(OwnRMSNorm(2), forward=_from(home))["rms_norm"].library == library


@pytest.mark.parametrize(("home", "library"), LIBRARIES)
def test_each_library_is_told_by_the_class_that_it_has_put_there(home, library):
    """In place of the model's own, with a forward of its own; one that only inherits is the model's still."""
    swapped = type("FusedRMSNorm", (torch.nn.Module,), {"forward": _from(home), "__module__": home})
    assert _libraries(swapped())["rms_norm"].library == library
    inherits = type("FusedRMSNorm", (OwnRMSNorm,), {"__module__": home})
    assert _libraries(inherits(2))["rms_norm"].library is None


def _from_file(path):
    """A forward as it is where a file of this path was loaded, under whatever name."""
    scope = {"__name__": "layers"}
    exec(compile("def forward(self, hidden):\n    return hidden\n", path, "exec"), scope)
    return scope["forward"]


@pytest.mark.parametrize(
    ("path", "library"),
    [
        ("/cache/hub/models--kernels-community--liger_kernels/snapshots/0f/build/layers.py", "kernels-community"),
        ("/cache/hub/models--somebody--kernels/snapshots/0f/build/layers.py", None),
    ],
)
def test_a_kernel_of_the_hub_is_told_by_its_file(path, library):
    """Its module has no name of its own; bound to a norm, or in a class that was put there."""
    assert _libraries(OwnRMSNorm(2), forward=_from_file(path))["rms_norm"].library == library
    swapped = type("LigerRMSNorm", (torch.nn.Module,), {"forward": _from_file(path)})
    assert _libraries(swapped())["rms_norm"].library == library


@pytest.mark.parametrize(
    ("home", "library"),
    [
        ("unsloth.kernels.fast_lora", "unsloth"),
        ("axolotl.kernels.lora", "axolotl"),
        ("unsloth.models.llama", None),
        ("axolotl.monkeypatch.lora_kernels", None),
        ("ours.kernels.fast_lora", None),
        ("unsloth.kernels_of_old", None),
    ],
)
def test_projections_are_fused_where_their_function_lies_among_the_kernels(home, library):
    """The plain ones are bound under the same names."""
    places = _libraries(Attention(), apply_qkv=_from(home), apply_o=_from(home))
    assert (places["qkv"].library, places["o"].library) == (library, library)


def test_projections_that_the_forward_does_not_call_are_not_fused():
    """Wherever they were bound; a forward may also ask for them by name."""
    fused = {"apply_qkv": _from("unsloth.kernels.fast_lora"), "apply_o": _from("unsloth.kernels.fast_lora")}
    places = _libraries(Plain(), **fused)
    assert (places["qkv"].library, places["o"].library) == (None, None)
    module = Plain()
    module.forward = MethodType(_asking, module)
    places = _libraries(module, **fused)
    assert (places["qkv"].library, places["o"].library) == ("unsloth", "unsloth")


@pytest.mark.parametrize("library", ["axolotl", "flash_attn", "unsloth"])
def test_whose_forward_it_is_says_nothing_of_what_it_calls(library):
    """Rotary embeddings and projections stay the model's own."""
    places = _libraries(Attention(), forward=_from(f"{library}.models.llama"))
    assert [places[kind].library for kind in ("rope", "qkv", "o")] == [None] * 3


def test_rotary_embeddings_are_told_by_the_function_that_is_called(monkeypatch):
    """By any name that says so."""
    assert _libraries(Attention())["rope"].library is None
    monkeypatch.setitem(globals(), "rotary_of_ours", _from("unsloth.kernels.rope_embedding"))
    assert _libraries(Attention())["rope"].library == "unsloth"
    assert _libraries(Plain())["rope"].library is None


def fused_norm(*args):
    """Stands for what a library has put into the module of a model's code."""
    return args


def test_another_function_of_a_library_is_no_rotary_embedding(monkeypatch):
    """Though the forward calls it."""

    class Normed(Plain):
        def forward(self, hidden):
            return fused_norm(rotary_of_ours(hidden))

    monkeypatch.setitem(globals(), "fused_norm", _from("liger_kernel.transformers.rms_norm"))
    assert _libraries(Normed())["rope"].library is None


@pytest.mark.parametrize("missing", ["q_proj", "k_proj"])
def test_what_lacks_a_projection_is_no_attention(missing):
    """It has no place for any of the three kinds."""
    module = Plain()
    delattr(module, missing)
    assert _libraries(module) == {}


def test_a_class_that_builds_on_a_norm_is_a_place_of_one():
    """Whatever it is called."""
    scaled = type("Scaled", (torch.nn.RMSNorm,), {})
    assert _libraries(scaled(2))["rms_norm"].library is None
    assert _libraries(torch.nn.LayerNorm(2)) == {}


ENTRY = {"caller": None, "training": True, "with_grad": True, "in_backward": False, "thread": 0}
CALL = [ModuleCall(names=("0",), **ENTRY)]
LABELS, GRADIENT = torch.ones(1, 2, dtype=torch.long), torch.ones(())


def _input(labels=None, *, name="labels", gradients=True, reached=True):
    call = ModelCall(module=torch.nn.Identity(), arguments={name: labels}, gradients=gradients)
    call.loss_gradients.extend([GRADIENT] if reached else [])
    return call


@pytest.mark.parametrize(
    ("inputs", "calls", "called", "hidden"),
    [
        ([_input(LABELS)], CALL, True, False),
        ([_input(LABELS, name="shift_labels")], CALL, True, False),
        ([_input(LABELS)], [], False, False),
        ([_input(None)], CALL, False, False),
        ([_input(LABELS, reached=False)], CALL, False, False),
        ([_input(LABELS), _input(None)], CALL, False, False),
        ([_input(LABELS), _input(LABELS, reached=False)], CALL, False, False),
        ([_input(LABELS), _input(None, gradients=False, reached=False)], CALL, True, False),
        ([_input(LABELS, gradients=False)], CALL, False, False),
        ([], CALL, False, True),
    ],
)
def test_a_fused_loss_counts_where_it_is_trained_on(inputs, calls, called, hidden):
    """With labels, and a gradient at what was returned; where the inputs were not seen, nobody knows."""
    place = _libraries(Head(), calls, inputs)["loss"]
    assert (place.library, place.called, place.hidden) == ("liger_kernel", called, hidden)
