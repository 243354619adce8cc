//! Whether the crates depend on each other only as the architecture allows.
//!
//! [`LAYERS`] is the layers table of the architecture: an edge that is not in it, of whatever kind, is a violation.
//! Development dependencies count too: a crate that is tested with the help of one above it cannot be understood, or
//! changed, without that one.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;
use std::process::Command;

use serde::Deserialize;

/// A crate of this workspace, and those it may depend on.
#[derive(Debug, Clone, Copy)]
pub struct Layer {
    /// The crate's folder: `proto`, or `chain/pallet`.
    pub folder: &'static str,
    /// The folders of the crates it may depend on.
    pub below: &'static [&'static str],
}

const fn layer(folder: &'static str, below: &'static [&'static str]) -> Layer {
    Layer { folder, below }
}

/// The layers table, lowest first. `proto` is below everything.
pub const LAYERS: &[Layer] = &[
    layer("proto", &[]),
    layer("gradient", &["proto"]),
    layer("rules", &["proto", "gradient"]),
    layer("model", &["proto", "gradient"]),
    layer("network", &["proto"]),
    layer("chain-client", &["proto"]),
    layer("simulation", &["proto", "gradient", "rules"]),
    // Never the model: a coordinator builds and runs on a small server, without libtorch.
    layer("coordinator", &["proto", "gradient", "rules", "network", "chain-client"]),
    layer("worker", &["proto", "gradient", "rules", "model", "network", "chain-client"]),
    layer("audit", &["proto", "gradient", "rules", "chain-client"]),
    layer("chain/pallet", &["proto"]),
    layer("chain/runtime", &["proto", "chain/pallet"]),
    layer("chain/devnet", &["proto", "chain/pallet", "chain/runtime"]),
    layer(
        "cli",
        &[
            "proto",
            "gradient",
            "rules",
            "model",
            "network",
            "chain-client",
            "simulation",
            "coordinator",
            "worker",
            "audit",
            "chain/devnet",
        ],
    ),
    layer("examples", BELOW_THE_TOP),
    layer("experiments", &["proto", "gradient", "rules", "model", "simulation"]),
    layer("integration-tests", BELOW_THE_TOP),
    layer("xtask", &[]),
];

const BELOW_THE_TOP: &[&str] = &[
    "proto",
    "gradient",
    "rules",
    "model",
    "network",
    "chain-client",
    "simulation",
    "coordinator",
    "worker",
    "audit",
    "chain/devnet",
    "cli",
];

/// Crates whose result must be the same on every machine and every time, so that they may not reach for the outside.
const PURE: &[&str] = &["proto", "gradient", "rules"];

/// Families of foreign crates that bring the outside: `quinn` stands for `quinn-proto` as well.
const OUTSIDE: &[&str] = &["tokio", "tch", "torch-sys", "quinn", "libp2p"];

/// The families that link libtorch, and the one crate that may name them.
const LIBTORCH: &[&str] = &["tch", "torch-sys"];
const LIBTORCH_USER: &str = "model";

/// What `cargo metadata --no-deps` says about the workspace, as far as it matters here.
#[derive(Debug, Clone, Deserialize)]
pub struct Metadata {
    /// The packages of the workspace.
    pub packages: Vec<Package>,
}

/// A package of the workspace.
#[derive(Debug, Clone, Deserialize)]
pub struct Package {
    /// Its name, `manyhands-…`.
    pub name: String,
    /// What its Cargo.toml asks for, whatever the platform and the features.
    pub dependencies: Vec<Dependency>,
}

/// One line of a Cargo.toml's dependencies.
#[derive(Debug, Clone, Deserialize)]
pub struct Dependency {
    /// The name of the package that is asked for, also where it is renamed.
    pub name: String,
    /// `None` for an ordinary dependency, else `dev` or `build`.
    pub kind: Option<String>,
}

/// Why `cargo metadata` could not be read.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    #[error("expected to run `{program} metadata`, but it did not start")]
    NotStarted { program: String, source: std::io::Error },
    #[error("expected `cargo metadata` to succeed, but it said: {stderr}")]
    Failed { stderr: String },
    #[error("expected JSON with the packages of the workspace from `cargo metadata`")]
    Unreadable(#[from] serde_json::Error),
}

/// Something in a Cargo.toml that the architecture does not allow.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Violation {
    /// An edge between two crates of the workspace that is not in [`LAYERS`].
    Edge { from: String, to: String, kind: &'static str, allowed: &'static [&'static str] },
    /// A foreign crate where it must not be.
    Foreign { from: String, to: String, kind: &'static str, reason: &'static str },
    /// A crate that [`LAYERS`] does not know.
    Unknown { name: String },
}

impl fmt::Display for Violation {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Edge { from, to, kind, allowed } => {
                write!(formatter, "{from} -> {to} ({kind}): ")?;
                if allowed.is_empty() {
                    write!(formatter, "{from} may depend on no crate of this workspace")
                } else {
                    write!(formatter, "{from} may depend on {} only", allowed.join(", "))
                }
            }
            Self::Foreign { from, to, kind, reason } => {
                write!(formatter, "{from} -> {to} ({kind}): {reason}")
            }
            Self::Unknown { name } => write!(
                formatter,
                "{name} is not in the layers table: write a decision record for the new crate and add it to LAYERS in \
                 xtask/src/layers.rs"
            ),
        }
    }
}

/// Asks cargo for the packages of the workspace whose root folder is `workspace`.
pub fn read_metadata(workspace: &Path) -> Result<Metadata, MetadataError> {
    let program = std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned());
    let output = Command::new(&program)
        .args(["metadata", "--no-deps", "--format-version", "1", "--manifest-path"])
        .arg(workspace.join("Cargo.toml"))
        .output()
        .map_err(|source| MetadataError::NotStarted { program, source })?;
    if !output.status.success() {
        return Err(MetadataError::Failed {
            stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        });
    }
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Everything in `metadata` that the architecture does not allow, in the order of the packages.
pub fn violations(metadata: &Metadata) -> Vec<Violation> {
    let workspace: BTreeSet<&str> =
        metadata.packages.iter().map(|package| package.name.as_str()).collect();
    let mut found = Vec::new();
    for package in &metadata.packages {
        let Some(layer) = LAYERS.iter().find(|layer| package_name(layer.folder) == package.name)
        else {
            found.push(Violation::Unknown { name: package.name.clone() });
            continue;
        };
        for dependency in &package.dependencies {
            if workspace.contains(dependency.name.as_str()) {
                found.extend(check_edge(layer, dependency));
            } else {
                found.extend(check_foreign(layer, dependency));
            }
        }
    }
    found
}

fn check_edge(layer: &Layer, dependency: &Dependency) -> Option<Violation> {
    let allowed = layer.below.iter().any(|folder| package_name(folder) == dependency.name);
    (!allowed).then(|| Violation::Edge {
        from: layer.folder.to_owned(),
        to: dependency.name.clone(),
        kind: kind(dependency),
        allowed: layer.below,
    })
}

fn check_foreign(layer: &Layer, dependency: &Dependency) -> Option<Violation> {
    let reason = if PURE.contains(&layer.folder) && is_of(&dependency.name, OUTSIDE) {
        "proto, gradient and rules are pure: no tokio, tch, quinn or libp2p"
    } else if layer.folder != LIBTORCH_USER && is_of(&dependency.name, LIBTORCH) {
        "model is the only crate that links libtorch"
    } else {
        return None;
    };
    Some(Violation::Foreign {
        from: layer.folder.to_owned(),
        to: dependency.name.clone(),
        kind: kind(dependency),
        reason,
    })
}

/// Whether `name` is one of `families`, or begins with one and a dash.
fn is_of(name: &str, families: &[&str]) -> bool {
    families.iter().any(|family| {
        name.strip_prefix(family).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
    })
}

fn kind(dependency: &Dependency) -> &'static str {
    match dependency.kind.as_deref() {
        Some("dev") => "dev-dependencies",
        Some("build") => "build-dependencies",
        Some(_) | None => "dependencies",
    }
}

fn package_name(folder: &str) -> String {
    format!("manyhands-{}", folder.replace('/', "-"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A dependency by its name and its kind.
    type Asked<'a> = (&'a str, Option<&'a str>);

    /// A workspace of the given packages, each with its dependencies.
    fn workspace(packages: &[(&str, &[Asked<'_>])]) -> Metadata {
        let packages = packages
            .iter()
            .map(|(name, dependencies)| Package {
                name: (*name).to_owned(),
                dependencies: dependencies
                    .iter()
                    .map(|(name, kind)| Dependency {
                        name: (*name).to_owned(),
                        kind: kind.map(str::to_owned),
                    })
                    .collect(),
            })
            .collect();
        Metadata { packages }
    }

    fn messages(metadata: &Metadata) -> Vec<String> {
        violations(metadata).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn this_workspace_keeps_to_its_layers() {
        // Cargo runs a test in its package's folder. A path from the build would be that of whoever filled the cache.
        let metadata = read_metadata(Path::new("..")).expect("cargo metadata can be read");
        assert!(metadata.packages.len() > 1, "cargo metadata names the packages of the workspace");
        let found = messages(&metadata);
        assert!(
            found.is_empty(),
            "a Cargo.toml goes against the layers of the architecture:\n  {}",
            found.join("\n  ")
        );
    }

    #[test]
    fn the_table_itself_points_down_only() {
        for (position, layer) in LAYERS.iter().enumerate() {
            for below in layer.below {
                let is_lower = LAYERS[..position].iter().any(|lower| lower.folder == *below);
                assert!(is_lower, "{} -> {below}", layer.folder);
            }
        }
    }

    #[test]
    fn an_edge_down_is_allowed() {
        let metadata = workspace(&[
            ("manyhands-proto", &[("serde", None)]),
            ("manyhands-rules", &[("manyhands-proto", None)]),
        ]);
        assert_eq!(messages(&metadata), Vec::<String>::new());
    }

    #[test]
    fn an_edge_up_is_named_with_what_is_allowed() {
        let metadata = workspace(&[
            ("manyhands-model", &[]),
            ("manyhands-coordinator", &[("manyhands-model", None)]),
        ]);
        assert_eq!(
            messages(&metadata),
            [
                "coordinator -> manyhands-model (dependencies): coordinator may depend on proto, gradient, rules, network, \
                 chain-client only"
            ]
        );
    }

    #[test]
    fn development_dependencies_count_too() {
        let metadata = workspace(&[
            ("manyhands-simulation", &[]),
            ("manyhands-rules", &[("manyhands-simulation", Some("dev"))]),
        ]);
        assert_eq!(
            messages(&metadata),
            [
                "rules -> manyhands-simulation (dev-dependencies): rules may depend on proto, gradient only"
            ]
        );
    }

    #[test]
    fn the_pure_crates_know_nothing_of_the_outside() {
        let metadata = workspace(&[
            ("manyhands-gradient", &[("quinn-proto", Some("build"))]),
            ("manyhands-rules", &[("tokio", None), ("tokenizers", None)]),
        ]);
        assert_eq!(
            messages(&metadata),
            [
                "gradient -> quinn-proto (build-dependencies): proto, gradient and rules are pure: no tokio, tch, quinn or \
                 libp2p",
                "rules -> tokio (dependencies): proto, gradient and rules are pure: no tokio, tch, quinn or libp2p",
            ]
        );
    }

    #[test]
    fn only_the_model_links_libtorch() {
        let metadata = workspace(&[
            ("manyhands-model", &[("tch", None)]),
            ("manyhands-worker", &[("tch", None)]),
        ]);
        assert_eq!(
            messages(&metadata),
            ["worker -> tch (dependencies): model is the only crate that links libtorch"]
        );
    }

    #[test]
    fn a_new_crate_asks_for_a_decision() {
        let metadata = workspace(&[("manyhands-helpers", &[])]);
        assert_eq!(
            violations(&metadata),
            [Violation::Unknown { name: "manyhands-helpers".to_owned() }]
        );
    }
}
