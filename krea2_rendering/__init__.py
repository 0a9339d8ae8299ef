"""Pictures of tables of 10^5 rows and more, on many GPUs and machines, through Ray Data.

    tables -> jobs -> painting (actors with the model) -> writing (tasks) -> ledger (the driver)

A job is a picture of a row, by a key made of its content. The ledger is `results.jsonl`, which the
plain `krea2 render` writes too; a run makes what is not in it. So a run that ends at any place goes
on with the same command. `requirements-rendering.txt` lists what it needs beside the nodes.
"""
