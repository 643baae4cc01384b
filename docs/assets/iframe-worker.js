// Pages that are opened from the disk get no workers from the browser: there the search's worker runs in a hidden frame.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      this.waiting = [];
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.title = "search";
      const begin = () => {
        document.body.append(frame);
        const script = frame.contentDocument.createElement("script");
        frame.contentWindow.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
        script.src = url;
        script.onload = () => {
          this.frame = frame.contentWindow;
          this.waiting.splice(0).forEach((data) => this.postMessage(data));
        };
        frame.contentDocument.body.append(script);
      };
      document.body ? begin() : addEventListener("DOMContentLoaded", begin);
    }
    postMessage(data) {
      if (this.frame) this.frame.dispatchEvent(new MessageEvent("message", { data }));
      else this.waiting.push(data);
    }
  };
}
