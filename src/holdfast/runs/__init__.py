"""What a run is: order by seq_id, journal, snapshots, replay, lifetime. Knows no HTTP."""
