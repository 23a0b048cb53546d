"""Everything that depends on the device.

Only this module imports the folders ``cpu`` and ``cuda``, each when its platform is created, so a GPU machine needs
no Numba and a CPU machine no Triton. Environment variables, which are set before torch is imported, are in
``environment``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

import torch
from transformers import PreTrainedModel

from server.engine.adapters.backend import AdapterBackend, PlainAdapters
from server.engine.adapters.products import Product
from server.engine.attention.backend import AttentionBackend, SDPABackend
from server.engine.attention.decode_batch import Recorder
from server.engine.attention.kv_cache import KVCache
from server.engine.attention.memory import DeviceMemory
from server.engine.attention.transfers import CopyStream
from server.engine.host_memory import available_host_memory
from server.engine.model.exactness import check_kernels
from server.engine.sampling.sampler import Largest, torch_largest
from server.errors import EngineStartError

logger = logging.getLogger(__name__)

MakeBackend = Callable[[KVCache], AttentionBackend]

CPU_DEFAULT_FRACTION = 0.4

NUMBA = {"numba", "llvmlite"}
"""Packages of the extra ``cpu``."""


class Platform:
    """A device served by torch's own operations; subclasses have faster ones.

    Args:
        device: The device of the model and its cache.
        backends: Attention backends, the fastest first; each is the fallback of the one before.

    Attributes:
        largest: Returns each row's largest logit and its token, like ``torch_largest``.
        batch_step_tokens: Maximum of tokens of the tier ``batch`` in a step: large enough to use the device, and
            small enough for short steps, which arriving requests wait for.
        has_own_memory: Whether what it computes with is copied from the host's memory to its own.
        overlaps_host: Whether queued operations run while the host goes on, so that it can prepare the next step.
    """

    has_own_memory = False
    overlaps_host = False
    batch_step_tokens = 512

    def __init__(self, device: torch.device, backends: Sequence[MakeBackend] = (SDPABackend,)) -> None:
        self.device = device
        self.backends = tuple(backends)
        self.largest: Largest = torch_largest

    @property
    def name(self) -> str:
        """The kind of device, by torch's name."""
        return self.device.type

    @property
    def num_threads(self) -> int:
        """The threads that compute the model; 0 if the host does not compute it."""
        return 0 if self.has_own_memory else torch.get_num_threads()

    def set_num_threads(self, number: int | None) -> None:
        """Set the threads of operations on the host; None leaves torch's choice."""
        if number is not None:
            torch.set_num_threads(number)

    def best_dtype(self, checkpoint: torch.dtype | None) -> torch.dtype | None:
        """The dtype in which a checkpoint of some dtype is served fastest; None, for unknown, stays None."""
        return checkpoint

    def free_memory(self) -> tuple[int, float]:
        """Free bytes, and the fraction that keys and values take by default, if there is no ``device_memory``."""
        return available_host_memory(), CPU_DEFAULT_FRACTION

    def device_memory(self) -> DeviceMemory | None:
        """Reads the device's memory, to give keys and values what the largest step leaves; None if nothing can."""
        return None

    def prepare(self, model: PreTrainedModel) -> Callable[[], None] | None:
        """Replace modules of a loaded model by faster ones.

        Returns:
            A function that restores the model's own layers, for a model that is not served exactly without them; None
            if no layer was replaced.
        """
        del model
        return None

    def bind(self, model: PreTrainedModel, backend: AttentionBackend) -> None:
        """Connect the modules from ``prepare`` with the attention backend.

        Raises:
            EngineStartError: If they do not work with this backend.
        """

    def adapter_backend(
        self, products: Sequence[Product], device: torch.device, dtype: torch.dtype
    ) -> AdapterBackend:
        """Computes the products of steps with adapters.

        Args:
            products: The products of the served model.
            device: The device of the model.
            dtype: The serving dtype.
        """
        del dtype
        return PlainAdapters(products, device)

    def check_kernels(self, backend: AttentionBackend, num_heads: int) -> None:
        """Check a backend over more keys than the texts of ``ExactnessCheck`` have.

        Args:
            backend: The backend; the model has run through it.
            num_heads: Query heads of a layer.

        Raises:
            EngineStartError: If it differs from plain attention, or fails.
        """

    def recorder(self) -> Recorder | None:
        """A recorder of decode steps; None if steps are not recorded."""
        return None

    def copy_stream(self) -> CopyStream | None:
        """A stream for copies beside the steps; None if the device computes nothing while the host copies."""
        return None

    def check_device(self) -> None:
        """Check after an error that the device computes what was queued, and can compute more.

        Raises:
            Exception: Of any type, if it cannot in this process. A CPU always can.
        """


class CPUPlatform(Platform):
    """CPUs: kernels compiled by Numba, fused layers, linear layers packed by oneDNN.

    Without Numba, torch's attention and the model's own layers serve, with a warning.

    Attributes:
        has_fast_bfloat16: Whether the processor multiplies bfloat16 faster than float32.
    """

    batch_step_tokens = 64

    def __init__(self) -> None:
        from server.engine.cpu.packed_linear import can_pack, has_fast_bfloat16, pack_linears

        super().__init__(torch.device("cpu"))
        self.has_fast_bfloat16 = has_fast_bfloat16()
        self._can_pack = can_pack
        self._pack_linears = pack_linears
        self._has_kernels = False
        try:
            from server.engine.cpu.adapter_backend import make_adapters
            from server.engine.cpu.compiled import set_num_threads
            from server.engine.cpu.cpu_attention import make_backend
            from server.engine.cpu.fused_layers import bind, fuse_layers, unfuse_layers
            from server.engine.cpu.row_kernels import can_compile, largest
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] not in NUMBA:
                raise
            logger.warning(
                "Numba is not installed: torch's own attention and layers serve, which is slower; "
                "pip install 'prelude-server[cpu]'"
            )
            return
        self._has_kernels = True
        self.backends = (make_backend,)
        self._set_num_threads, self._bind, self._make_adapters = set_num_threads, bind, make_adapters
        self._fuse_layers, self._unfuse_layers = fuse_layers, unfuse_layers
        self._can_compile, self._compiled_largest = can_compile, largest
        self.largest = self._largest

    def set_num_threads(self, number: int | None) -> None:
        """Set the threads of torch and the compiled kernels, which share one pool; see the base class."""
        if self._has_kernels:
            self._set_num_threads(number or torch.get_num_threads())
        else:
            super().set_num_threads(number)

    def best_dtype(self, checkpoint: torch.dtype | None) -> torch.dtype | None:
        """float32 for float16, and for bfloat16 on CPUs without fast products of it."""
        is_slow = checkpoint is torch.float16 or (checkpoint is torch.bfloat16 and not self.has_fast_bfloat16)
        return torch.float32 if is_slow else checkpoint

    def prepare(self, model: PreTrainedModel) -> Callable[[], None] | None:
        """Fuse the layers of a known form, and pack the other linear layers; see the base class."""
        if not self._can_pack(model.dtype):
            return None
        num_fused = self._fuse_layers(model) if self._has_kernels else 0
        self._pack_linears(model)

        def unfuse() -> None:
            self._unfuse_layers(model)
            self._pack_linears(model)

        return unfuse if num_fused else None

    def bind(self, model: PreTrainedModel, backend: AttentionBackend) -> None:
        """Set the backend of fused attention; see the base class."""
        if self._has_kernels:
            self._bind(model, backend)

    def adapter_backend(
        self, products: Sequence[Product], device: torch.device, dtype: torch.dtype
    ) -> AdapterBackend:
        """Compiled kernels if Numba is installed; see the base class."""
        if self._has_kernels:
            return self._make_adapters(products, device, dtype)
        return super().adapter_backend(products, device, dtype)

    def _largest(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self._can_compile(logits.dtype):
            return self._compiled_largest(logits.contiguous())
        return torch_largest(logits)


class CUDAPlatform(Platform):
    """NVIDIA GPUs: Triton kernels and CUDA graphs.

    Args:
        device: The GPU.

    Raises:
        EngineStartError: If torch finds no CUDA device.
    """

    has_own_memory = True
    overlaps_host = True

    def __init__(self, device: torch.device | None = None) -> None:
        if not torch.cuda.is_available():
            raise EngineStartError(f"--device cuda: torch finds no CUDA device: {_why_no_cuda()}")
        from server.engine.cuda.adapter_backend import make_adapters
        from server.engine.cuda.copy_stream import CUDACopyStream
        from server.engine.cuda.device_memory import CUDAMemory
        from server.engine.cuda.fused_layers import bind, fuse_layers, unfuse_layers
        from server.engine.cuda.graphs import CUDARecorder
        from server.engine.cuda.triton_attention import TritonBackend

        device = device or torch.device("cuda")
        num_processors = torch.cuda.get_device_properties(device).multi_processor_count
        super().__init__(device, (partial(TritonBackend, num_processors=num_processors), SDPABackend))
        self._recorder, self._copy_stream = CUDARecorder, CUDACopyStream
        self._make_adapters = partial(make_adapters, num_processors=num_processors)
        self._device_memory = CUDAMemory
        self._fuse_layers, self._unfuse_layers, self._bind = fuse_layers, unfuse_layers, bind

    def device_memory(self) -> DeviceMemory | None:
        """The GPU's memory; see the base class."""
        return self._device_memory(self.device)

    def prepare(self, model: PreTrainedModel) -> Callable[[], None] | None:
        """Fuse the layers of a known form; see the base class."""
        num_fused = self._fuse_layers(model)
        # The memory of the replaced weights is for keys and values.
        torch.cuda.empty_cache()
        return partial(self._unfuse_layers, model) if num_fused else None

    def bind(self, model: PreTrainedModel, backend: AttentionBackend) -> None:
        """Set the backend of fused attention; see the base class."""
        self._bind(model, backend)

    def adapter_backend(
        self, products: Sequence[Product], device: torch.device, dtype: torch.dtype
    ) -> AdapterBackend:
        """Triton's kernels; see the base class."""
        return self._make_adapters(products, device, dtype, stream=self.copy_stream())

    def check_kernels(self, backend: AttentionBackend, num_heads: int) -> None:
        """Compare Triton's kernels with torch's attention over many keys; see the base class."""
        if type(backend) is not SDPABackend:
            check_kernels(backend, num_heads)

    def recorder(self) -> Recorder:
        """CUDA graphs."""
        return self._recorder()

    def copy_stream(self) -> CopyStream:
        """A CUDA stream."""
        return self._copy_stream(self.device)

    def check_device(self) -> None:
        """Wait for the GPU, which raises the error of any kernel before; see the base class."""
        torch.cuda.synchronize(self.device)
        # Up to torch 2.11, a capture that could not be ended leaves the allocator in a state in which this raises.
        torch.cuda.empty_cache()


def _why_no_cuda() -> str:
    """Why torch finds no GPU, and what to do."""
    built_for = torch.version.cuda
    if built_for is None:
        return f"torch {torch.__version__} is built without CUDA; install torch's CUDA build, or use --device cpu"
    return (
        f"torch {torch.__version__} is built for CUDA {built_for}, and finds no GPU or a driver that is older "
        "(nvidia-smi shows both); prelude doctor says more"
    )


def choose_platform(device: str) -> Platform:
    """The platform of a device.

    Args:
        device: "cpu", "cuda", or "auto" for CUDA if there is a GPU.

    Raises:
        EngineStartError: If there is no such device.
    """
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return CUDAPlatform()
    return CPUPlatform()
