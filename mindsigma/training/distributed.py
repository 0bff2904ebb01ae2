"""How the processes of a training run share the optimiser's states."""


def owners(sizes, count):
    """Process that owns each of the tensors of `sizes` elements, so that all own about the same number of elements."""
    loads, result = [0] * count, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        result[i] = loads.index(min(loads))
        loads[result[i]] += sizes[i]
    return result
