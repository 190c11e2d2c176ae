"""What a run would take, before it is started: memory, operations, time, traffic."""
