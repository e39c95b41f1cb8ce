from lamina_jax.engine.sampler import SamplingMode, SamplingTensors, sample
