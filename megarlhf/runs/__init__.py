"""What every stage needs to run: its folder, the loop, agreement between ranks, the model planner, records, schedules."""
