//! Work that is finished also if nobody waits for it any more.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::runtime::Handle;

/// Runs on the task that awaits it, without the two switches that a task of its own would cost; when
/// dropped unfinished, it goes on as one.
#[derive(Debug)]
pub struct ToTheEnd<F>(Option<Pin<Box<F>>>)
where
    F: Future<Output: Send> + Send + 'static;

impl<F> ToTheEnd<F>
where
    F: Future<Output: Send> + Send + 'static,
{
    /// `work`, not started yet.
    pub fn new(work: F) -> Self {
        Self(Some(Box::pin(work)))
    }
}

impl<F> Future for ToTheEnd<F>
where
    F: Future<Output: Send> + Send + 'static,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let Some(work) = &mut self.0 else { return Poll::Pending };
        let done = work.as_mut().poll(context);
        if done.is_ready() {
            self.0 = None;
        }
        done
    }
}

impl<F> Drop for ToTheEnd<F>
where
    F: Future<Output: Send> + Send + 'static,
{
    fn drop(&mut self) {
        // What panicked cannot go on.
        if let Some(work) = self.0.take().filter(|_| !std::thread::panicking())
            && let Ok(runtime) = Handle::try_current()
        {
            runtime.spawn(work);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    use tokio::sync::{Notify, oneshot};

    use super::*;

    #[tokio::test]
    async fn what_is_awaited_gives_its_result() {
        assert_eq!(ToTheEnd::new(async { 6 * 7 }).await, 42);
    }

    #[tokio::test]
    async fn what_is_dropped_is_finished() {
        let go = Arc::new(Notify::new());
        let (tell, told) = oneshot::channel();
        let work = {
            let go = Arc::clone(&go);
            async move {
                go.notified().await;
                tell.send(()).unwrap();
            }
        };
        let given_up = tokio::time::timeout(Duration::from_millis(1), ToTheEnd::new(work)).await;
        assert!(given_up.is_err());
        go.notify_one();
        tokio::time::timeout(Duration::from_secs(10), told).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn what_panics_does_not_go_on() {
        let polled = Arc::new(AtomicBool::new(false));
        let again = Arc::clone(&polled);
        let task = tokio::spawn(ToTheEnd::new(std::future::poll_fn::<(), _>(move |_| {
            assert!(!polled.swap(true, Ordering::SeqCst), "polled after it had panicked");
            panic!("on purpose");
        })));
        let text = *task.await.unwrap_err().into_panic().downcast::<&str>().unwrap();
        assert_eq!(text, "on purpose");
        assert!(again.load(Ordering::SeqCst));
    }
}
