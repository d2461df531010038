"""What our kernels are compared with, one file an operation: see `operation.Operation`."""

from benchmarks.rivals import bow, linear_cross_entropy, prefixed_embedding, word_dropout
from benchmarks.rivals.operation import Operation

OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        linear_cross_entropy.OPERATION,
        bow.BCE,
        bow.CATEGORICAL,
        word_dropout.OPERATION,
        prefixed_embedding.OPERATION,
    )
}
