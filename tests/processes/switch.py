"""A network switch between tap devices: delays, loses and cuts what it forwards, as commands on stdin say.

    switch.py PREFIX COUNT    makes PREFIX0, PREFIX1, ...; says "ready" when they stand, and "ok" after every command
    delay MS                  every frame takes this long
    loss PERCENT              so many frames are lost
    cut FROM TO               nothing passes from one to another, in this direction
    mend                      everything passes again, at once
"""

import fcntl
import heapq
import os
import random
import selectors
import struct
import sys
import time

TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 2, 0x1000


def tap(name):
    file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TAP | IFF_NO_PI))
    return file


class Switch:
    def __init__(self, taps):
        self.taps, self.index_of, self.delay, self.loss, self.cuts = taps, {}, 0.0, 0.0, set()
        self.waiting, self.count, self.random = [], 0, random.Random(1)

    def command(self, line):
        word, *numbers = line.split()
        if word == "delay":
            self.delay = float(numbers[0]) / 1000
        elif word == "loss":
            self.loss = float(numbers[0]) / 100
        elif word == "cut":
            self.cuts.add((int(numbers[0]), int(numbers[1])))
        elif word == "mend":
            self.delay, self.loss, self.cuts = 0.0, 0.0, set()
        else:
            raise ValueError(line)
        print("ok", flush=True)

    def take(self, source):
        try:
            frame = os.read(self.taps[source], 65536)
        except OSError:
            # It is not up.
            return
        to, self.index_of[frame[6:12]] = self.index_of.get(frame[:6]), source
        for target in range(len(self.taps)) if to is None else [to]:
            lost = self.loss and self.random.random() < self.loss
            if target != source and (source, target) not in self.cuts and not lost:
                self.count += 1
                heapq.heappush(self.waiting, (time.monotonic() + self.delay, self.count, target, frame))

    def deliver(self):
        """Delivers what is due; returns in how many seconds the next is."""
        while self.waiting:
            left = self.waiting[0][0] - time.monotonic()
            if left > 0:
                return left
            _, _, target, frame = heapq.heappop(self.waiting)
            try:
                os.write(self.taps[target], frame)
            except OSError:
                # It is not up, or full: as on a cable.
                pass
        return None


def main():
    taps = [tap(f"{sys.argv[1]}{number}") for number in range(int(sys.argv[2]))]
    switch, selector = Switch(taps), selectors.DefaultSelector()
    for number, file in enumerate(taps):
        selector.register(file, selectors.EVENT_READ, number)
    selector.register(sys.stdin, selectors.EVENT_READ, None)
    print("ready", flush=True)
    while True:
        for key, _ in selector.select(switch.deliver()):
            if key.data is not None:
                switch.take(key.data)
                continue
            line = sys.stdin.readline()
            if not line:
                return
            switch.command(line)


main()
