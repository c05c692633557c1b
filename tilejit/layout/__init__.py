"""Pure index maths: fragment maps and shared-memory layouts."""
