//! Small runnable programs, and the cheating workers: what this project's libraries look like from outside.
