"""What decides the bits of float arithmetic in this process."""

from __future__ import annotations

import os

import torch

from icrf.protocol import Fingerprint

# Switches that change which vector code the libraries pick, beyond what the processor offers.
_VARIABLES = ("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


def numeric_fingerprint(device: str, num_threads: int) -> Fingerprint:
    """The numeric fingerprint of hosts on this machine; clusters with equal ones compute equal bits.

    Measured: AVX2 and AVX-512, or one and two threads, give different bits.

    Args:
        device: ``cpu``, or where there are GPUs ``cuda:`` and their kind.
        num_threads: threads per host, as the hosts set them with ``torch.set_num_threads``.
    """
    switches = {
        "onednn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
        "mkl": torch.backends.mkl.is_available(),
        "matmul": torch.get_float32_matmul_precision(),
        **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }
    return Fingerprint(
        torch_version=str(torch.__version__),
        cpu_capability=str(torch.backends.cpu.get_cpu_capability()),
        mkldnn=",".join(f"{name}={value}" for name, value in switches.items()),
        num_threads=num_threads,
        device=device,
    )
