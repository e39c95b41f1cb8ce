"""The GPUs that programs are compiled for."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A GPU of the Hopper generation, as far as XLA's compiler asks.

    Attributes:
        name: as it is called in flags and tables.
        description: as the driver calls it.
        num_sms: streaming multiprocessors.
        memory_bytes: device memory, as the driver reports it.
        memory_bandwidth: bytes per second.
        l2_cache_bytes: second-level cache.
        clock_ghz: of the multiprocessors.
    """

    name: str
    description: str
    num_sms: int
    memory_bytes: int
    memory_bandwidth: int
    l2_cache_bytes: int
    clock_ghz: float

    @property
    def config(self) -> str:
        """XLA's GpuTargetConfigProto, in protobuf's text format.

        XLA makes no command buffers (CUDA graphs) of custom calls and cuBLASLt's products unless it knows of a driver
        of 12.3 or later, so driver and toolkit are stated: those of CUDA 13.0, which the wheels are of.
        """
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: {self.num_sms} fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.memory_bandwidth} l2_cache_size: {self.l2_cache_bytes} clock_rate_ghz: {self.clock_ghz}
  device_memory_size: {self.memory_bytes}
  cuda_compute_capability {{ major: 9 feature_extension: ACCELERATED_FEATURES }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "{self.description}"
"""


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(
            name="h100",
            description="NVIDIA H100 80GB HBM3",
            num_sms=132,
            memory_bytes=84_929_347_584,
            memory_bandwidth=3_352_320_000_000,
            l2_cache_bytes=50 << 20,
            clock_ghz=1.98,
        ),
        Target(
            name="h20",
            description="NVIDIA H20",
            num_sms=78,
            memory_bytes=96_000_000_000,
            memory_bandwidth=4_000_000_000_000,
            l2_cache_bytes=60 << 20,
            clock_ghz=1.98,
        ),
    )
}
