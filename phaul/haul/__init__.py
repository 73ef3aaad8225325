"""The file systems that a container lives on, where they are not on storage that both hosts see.

    trees.py       what is to be asked about a directory, and how the destination knows it (shared, free, in the way)
    layers.py      what an overlay is made of, where a directory is one
    watch.py       which names below a directory were touched, by inotify
    index.py       what the destination has of it, and what that lacks
    content.py     what files hold: runs of data, blocks that have changed
    attributes.py  what chattr(1) sets
    leaving.py     the source: rounds, the last of which is in the freeze
    rsync.py       the first round, by rsync where both hosts have it
    btrfs.py       the first round of a subvolume, by snapshots, where both hosts have btrfs
    wire.py        the letters in which all of that travels
    arriving.py    the destination: a directory beside the final place, which gets its name after the commit
    overlay.py     the destination: an overlay, mounted over what comes in
    beside.py      what stands in the journals of it: to be undone, or finished, whoever does it

Nothing here knows a container runtime. A workload names its directories (`Found.trees`); at the destination it gets
`Places`, by which the runtime's commands see what has come so far under the final names.
"""
