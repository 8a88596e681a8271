"""What the rooms above agree on: plain data, no behaviour.

``dtypes`` is the table of dtypes; ``argument_block`` lists what a kernel reads, field by field, in the memory that machine code
and Python share; ``variant`` says what a kernel is compiled for, and the sizes that plans and kernels both rely on; ``tasks``
says what a plan has to know of each task. No other room of fastxent is imported here. Begin with `variant.Variant`.
"""
