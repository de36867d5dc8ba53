"""What can go wrong without a mistake in the program, in one place: every command turns it into a sentence, and nothing else."""

# Files and connections, values, kinds of values, missing libraries, divergence, memory. All but the last are raised with a message of
# one sentence. Whatever else a command meets is a mistake of ours, and is shown with its traceback.
EXPECTED = (OSError, ValueError, TypeError, ImportError, FloatingPointError, MemoryError)
_LONGEST = 2000  # characters of a message: some values that it may show are megabytes
NO_MEMORY = ("DefaultCPUAllocator", "could not create a primitive", "Cannot allocate memory", "bad_alloc", "out of memory")


def sentence(error: BaseException) -> str:
    """The message of an error in one line, cut where it is absurdly long, and with nothing that a terminal cannot print."""
    if isinstance(error, MemoryError) or is_out_of_memory(error):
        return "there is not enough memory: lower batch_size, resolution or the widths."
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a RuntimeError is torch's way to say that memory is used up."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)
