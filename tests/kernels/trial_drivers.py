"""What the trial kernel meets on drivers that are not here. Prints, as JSON, what was found on each."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget

from offload_triforce.kernels import ops, trial
from offload_triforce.machine import doctor
from tests.kernels.recorder import Recorder


class Driver(Recorder):
    """Loads what Triton compiles for ``capability``, or refuses to; and computes what the kernel would, or does not."""

    def __init__(self, capability, refusal=None, computes=True):
        super().__init__()
        self.capability, self.refusal, self.computes = capability, refusal, computes
        self.utils.load_binary = self.load

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def load(self, name, binary, shared, device):
        if self.refusal is not None:
            raise RuntimeError(self.refusal)
        return 1, name, 0, 0, 1024

    def launcher(self, source, metadata):
        def launch(x, y, z, stream, function, packed, launch_metadata, enter, leave, numbers, doubled, *rest):
            self.launches.append(function)
            if self.computes:
                doubled.copy_(2 * numbers)

        return launch


def found_on(driver):
    """What ``doctor`` says of Triton with this driver, and how many kernels were launched."""
    trial._double_kernel.device_caches.clear()  # what another driver has loaded
    triton.runtime.driver.set_active(driver)
    finding = doctor.check_triton()
    return {"state": finding.state, "found": finding.found, "remedy": finding.remedy, "launches": len(driver.launches)}


def main():
    torch.cuda.is_available = lambda: True
    invalid = "Triton Error [CUDA]: device kernel image is invalid"
    report = {"good": found_on(Driver(89))}
    report |= {f"old {cc}": found_on(Driver(cc, invalid)) for cc in (89, 120)}
    report["wrong numbers"] = found_on(Driver(89, computes=False))
    report["no compiler"] = found_on(Driver(89, "Failed to find C compiler. Please specify it."))
    report["unheard of"] = found_on(Driver(89, "something new"))
    report["ptxas"] = triton.knobs.nvidia.ptxas.version, triton.knobs.nvidia.ptxas_blackwell.version
    ops.verify_attention, kept = None, ops.verify_attention  # as where Triton is not installed
    report["no triton"] = ops.what_stops_triton()
    ops.verify_attention = kept
    torch.cuda.is_available = lambda: False
    report["no card"] = found_on(SimpleNamespace(launches=[]))
    json.dump(report, sys.stdout)


if __name__ == "__main__":
    main()
