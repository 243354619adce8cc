//! The recipes in `configs/`, and the command as a program sees it.

mod command;
mod recipes;
