"""What the next step computes: pure logic, without torch."""
