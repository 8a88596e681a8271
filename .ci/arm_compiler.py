"""Compiles kernels for 64-bit Arm on whatever machine this is, for an emulated process that asks for them over a socket.

Inside the emulator a kernel would take a minute.
"""

import sys
from multiprocessing.connection import Listener

from fastxent._codegen import cross, levels

if __name__ == "__main__":
    cross.use(next(level for level in levels.LEVELS if level.name == "aarch64"))
    from fastxent._codegen.compiler import object_code

    with Listener(sys.argv[1], "AF_UNIX") as listener:
        while True:
            with listener.accept() as connection:
                connection.send_bytes(object_code(*connection.recv()))
