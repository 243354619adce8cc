//! GPUs, as their own driver tells them.

use std::process::Command;

use serde::Serialize;

/// How to build for them.
#[cfg(feature = "worker")]
pub(crate) const REBUILD: &str = "build again with `make build TORCH=cuda`";

/// A GPU that a driver is loaded for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Gpu {
    pub(crate) name: String,
    pub(crate) memory: String,
    pub(crate) driver: String,
}

/// The NVIDIA GPUs of this machine; none where there is no driver.
pub(crate) fn found() -> Vec<Gpu> {
    let query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"];
    let output = Command::new("nvidia-smi").args(query).output();
    let text = output.ok().filter(|output| output.status.success()).map(|output| output.stdout);
    parse(&String::from_utf8_lossy(&text.unwrap_or_default()))
}

fn parse(text: &str) -> Vec<Gpu> {
    let gpus = text.lines().filter_map(|line| {
        let mut fields = line.split(", ").map(|field| field.trim().to_owned());
        Some(Gpu { name: fields.next()?, memory: fields.next()?, driver: fields.next()? })
    });
    gpus.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_drivers_list_is_read() {
        let gpus =
            parse("NVIDIA H100 80GB HBM3, 81559 MiB, 570.86.15\nNVIDIA L4, 23034 MiB, 570.86.15\n");
        assert_eq!(gpus.len(), 2);
        assert_eq!((gpus[1].name.as_str(), gpus[1].memory.as_str()), ("NVIDIA L4", "23034 MiB"));
        assert_eq!(parse(""), []);
        assert_eq!(parse("No devices were found"), []);
    }
}
