"""An attention worker that knows the kind of channel of `answering.py`; the first argument names the class to use."""

import sys

import answering

from lamina_jax.runtime import attention_worker
from lamina_jax.runtime.messages import Done

if __name__ == "__main__":
    name = sys.argv.pop(1)
    if name == "Done":  # a worker that does not know of answers
        attention_worker.Done = lambda **_: Done()
        name = "AnsweringChannel"
    answering.register(name)
    attention_worker.run()
