//! Where log lines go: to stderr, ours at the recipe's level, those of libraries only from warnings on.

use contraflow_runtime::recipe::LogLevel;
use tracing_subscriber::EnvFilter;

/// Sends log lines to stderr from now on; a second call in a process changes nothing.
pub fn init(level: LogLevel) {
    let ours = match level {
        LogLevel::Error => "error",
        LogLevel::Warn => "warn",
        LogLevel::Info => "info",
        LogLevel::Debug => "debug",
        LogLevel::Trace => "trace",
    };
    // Targets are matched by prefix: all crates of this workspace begin alike.
    let filter = EnvFilter::new(format!("warn,contraflow={ours}"));
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Whoever came first, a test for instance, has set it up already.
    let _ = lines.with_ansi(std::env::var_os("NO_COLOR").is_none()).try_init();
}
