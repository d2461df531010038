"""What our kernels are compared with, one file an operation: see `operation.Operation`."""

from benchmarks.rivals import bag_of_words, linear_cross_entropy, prefixed_embedding, word_dropout
from benchmarks.rivals.operation import Operation

# By name, in the order in which they are measured.
OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        linear_cross_entropy.OPERATION,
        bag_of_words.BCE,
        bag_of_words.CATEGORICAL,
        word_dropout.OPERATION,
        prefixed_embedding.OPERATION,
    )
}
