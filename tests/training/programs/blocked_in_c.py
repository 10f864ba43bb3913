"""A trainer whose main thread waits in C, as in a collective whose peer is gone, and never reaches a step boundary."""

import threading

from bbu.training.preemption import install_stop_handlers, leave_on_second_interrupt


def main() -> None:
    install_stop_handlers()
    leave_on_second_interrupt()
    print("blocked", flush=True)
    lock = threading.Lock()
    lock.acquire()
    while True:
        lock.acquire()


if __name__ == "__main__":
    main()
