"""Calls of NVML, whatever becomes of them: the one binding to nvidia-ml-py in this project.

NVML asks the driver and creates no CUDA context, so the parent and a process that will fork may use it. Everything is a
`Reading`: GPUs, drivers and containers differ in what they tell, and a counter that is not there must neither end a
measurement nor count as zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from lorameter.machine.reading import Reading, missing

V = TypeVar("V")

_WORDS: dict[str, str] = {
    "NVML_ERROR_NOT_SUPPORTED": "this GPU or its driver does not offer it",
    "NVML_ERROR_NO_PERMISSION": "this process is not permitted to read it",
    "NVML_ERROR_FUNCTION_NOT_FOUND": "the installed driver is too old for it",
    "NVML_ERROR_LIBRARY_NOT_FOUND": "there is no libnvidia-ml.so.1: no NVIDIA driver is installed, or the container "
    "was started without it",
    "NVML_ERROR_DRIVER_NOT_LOADED": "the NVIDIA driver is installed and not loaded",
    "NVML_ERROR_GPU_IS_LOST": "the GPU no longer answers; it has to be reset",
    "NVML_ERROR_NOT_FOUND": "there is no such device",
    "NVML_ERROR_INVALID_ARGUMENT": "there is no such device",
    "NVML_ERROR_LIB_RM_VERSION_MISMATCH": "the driver was updated and the machine not restarted",
}


def started() -> Reading[Any]:
    """nvidia-ml-py, ready to be asked; every start takes an end, and the last end closes the library."""
    try:
        import pynvml
    except ImportError as error:
        return missing(f"nvidia-ml-py is not installed: {error}")
    except Exception as error:  # a broken installation, or another package that calls itself pynvml
        return missing(f"nvidia-ml-py cannot be imported: {type(error).__name__}: {error}")
    begun = asked(pynvml, "nvmlInit", convert=lambda _: True)
    return Reading(value=pynvml) if begun.known else missing(begun.reason)


def ended(nvml: Any) -> None:
    """The end that a start takes."""
    asked(nvml, "nvmlShutdown", convert=lambda _: True)


def by_uuid(nvml: Any, uuid: str) -> Reading[Any]:
    """By the whole of it, else by the one GPU whose UUID begins so."""
    whole = asked(nvml, "nvmlDeviceGetHandleByUUID", uuid, convert=lambda handle: handle)
    if whole.known:
        return whole
    begins = [
        handle.value
        for handle in handles_of(nvml)
        if handle.known
        and (asked(nvml, "nvmlDeviceGetUUID", handle.value, convert=text_of).value or "").startswith(uuid)
    ]
    if len(begins) == 1:
        return Reading(value=begins[0])
    return missing(f"{len(begins)} devices have a UUID that begins with {uuid}" if begins else whole.reason)


def handle_of(nvml: Any, entry: int | str) -> Reading[Any]:
    """Of an entry of CUDA_VISIBLE_DEVICES: a GPU's number along the bus, or a UUID."""
    if isinstance(entry, str):
        return by_uuid(nvml, entry)
    return asked(nvml, "nvmlDeviceGetHandleByIndex", entry, convert=lambda handle: handle)


def handles_of(nvml: Any) -> list[Reading[Any]]:
    """Of all GPUs, in the order in which NVML counts them."""
    count = asked(nvml, "nvmlDeviceGetCount", convert=int).value or 0
    return [handle_of(nvml, index) for index in range(count)]


def card_of(nvml: Any, handle: Any) -> Reading[Any]:
    """The GPU of a MIG instance; missing for a whole GPU."""
    return asked(nvml, "nvmlDeviceGetDeviceHandleFromMigDeviceHandle", handle, convert=lambda found: found)


def asked(
    nvml: Any, function: str, *arguments: Any, convert: Callable[[Any], V], constants: tuple[str, ...] = ()
) -> Reading[V]:
    """One call of NVML, whatever becomes of it; `constants` are arguments by the names that the binding gives them.

    Beside the errors of NVML the binding raises its own: of a name that is no text, a structure that the driver fills
    otherwise, a constant that came or went with a version. None of them may cost a measurement.
    """
    unknown = next((name for name in (function, *constants) if not hasattr(nvml, name)), None)
    if unknown is not None:
        return missing(f"{function}: the installed nvidia-ml-py does not know {unknown}")
    try:
        return Reading(value=convert(getattr(nvml, function)(*arguments, *(getattr(nvml, one) for one in constants))))
    except Exception as error:
        return missing(f"{function}: {_why(nvml, error)}")


def _why(nvml: Any, error: Exception) -> str:
    """In our words where NVML's code is known; an error of the binding with its type, as few say anything without."""
    if not isinstance(error, getattr(nvml, "NVMLError", ())):
        return f"{type(error).__name__}: {error}"
    code = getattr(error, "value", None)
    return next((text for name, text in _WORDS.items() if getattr(nvml, name, None) == code), str(error))


def text_of(value: str | bytes) -> str:
    """What the binding gives as either."""
    return value.decode() if isinstance(value, bytes) else value
