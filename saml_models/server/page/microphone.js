// The microphone as it sounds: nothing is cancelled, suppressed or turned up, nothing stops by itself.
const RATE = 16000;
const LONGEST = 30; // seconds of a clip that can be learnt from

export function withheld() {
  if (navigator.mediaDevices?.getUserMedia && window.AudioWorkletNode) return "";
  return window.isSecureContext
    ? "This browser gives pages no microphone. Files can be transcribed all the same."
    : "The browser withholds the microphone from pages that come over plain http from another " +
      "machine. Open this page on the machine itself (http://localhost), through an SSH tunnel, " +
      "or behind https.";
}

// Starts to record; onLevel(level 0..1, seconds) is called ten times a second.
export async function record(onLevel) {
  const stream = await navigator.mediaDevices.getUserMedia({
    audio: { channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false },
  });
  let context = new AudioContext({ sampleRate: RATE });
  let source;
  try {
    source = context.createMediaStreamSource(stream);
  } catch { // some browsers do not convert rates: the server does
    await context.close();
    context = new AudioContext();
    source = context.createMediaStreamSource(stream);
  }
  await context.audioWorklet.addModule("page/recorder.js");
  const node = new AudioWorkletNode(context, "recorder", { numberOfOutputs: 0, channelCount: 1, channelCountMode: "explicit" });
  const blocks = [];
  let samples = 0;
  node.port.onmessage = ({ data }) => {
    blocks.push(data);
    samples += data.length;
    const peak = data.reduce((most, sample) => Math.max(most, Math.abs(sample)), 0);
    onLevel(peak, samples / context.sampleRate);
  };
  source.connect(node);
  return {
    async stop() {
      const rate = context.sampleRate;
      source.disconnect();
      stream.getTracks().forEach((track) => track.stop());
      await context.close();
      onLevel(0, samples / rate);
      return { seconds: samples / rate, wav: wav(blocks, samples, rate) };
    },
  };
}

export const tooLong = (seconds) => seconds > LONGEST;

// 16-bit PCM.
function wav(blocks, samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples));
  const text = (at, value) => [...value].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
  text(0, "RIFF");
  view.setUint32(4, 36 + 2 * samples, true);
  text(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true);
  view.setUint16(22, 1, true);
  view.setUint32(24, rate, true);
  view.setUint32(28, 2 * rate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  text(36, "data");
  view.setUint32(40, 2 * samples, true);
  let at = 44;
  for (const block of blocks) {
    for (const sample of block) {
      view.setInt16(at, Math.max(-1, Math.min(1, sample)) * 32767, true);
      at += 2;
    }
  }
  return new Blob([view], { type: "audio/wav" });
}
