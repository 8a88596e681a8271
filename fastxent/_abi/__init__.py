"""What the rooms above agree on: plain data, no behaviour.

``dtypes`` is the table of them; ``argument_block`` lists what a kernel reads, field by field, and the words that machine code
and Python share; ``variant`` says what a kernel is compiled for, and the sizes that plans and kernels both rely on; ``tasks``
what a plan has to know of each task. Nothing of fastxent is imported here. Begin with `variant.Variant`.
"""
