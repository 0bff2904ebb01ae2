"""How the processes of a training run share the writing of what they keep."""


def owners(sizes, count):
    """Process that writes each of the tensors of `sizes` elements, so that all write about as many elements."""
    loads, result = [0] * count, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        result[i] = loads.index(min(loads))
        loads[result[i]] += sizes[i]
    return result
