from lamina_jax.engine.sampler import SamplingTensors, required_mode
build_sampling_tensors = SamplingTensors.build
